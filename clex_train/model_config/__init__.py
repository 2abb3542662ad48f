"""config.json of a model of transformers: the context length that it states, and RoPE values that none can have."""
