"""RoPE in a loaded model: the rotary module, probes of a family, rotation of cached keys, recipes."""
