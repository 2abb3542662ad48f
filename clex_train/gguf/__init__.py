"""GGUF files with RoPE factors for llama.cpp: written from a model, or added to an existing file."""
