"""config.json of a model of transformers: its context length, RoPE values that none can have, sizes, meta models."""
