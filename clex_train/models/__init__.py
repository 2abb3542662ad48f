"""Models of transformers: architecture, weights, directories with a CLEX field."""
