"""LM-Infinite: the Lambda mask, its caches and back ends, on the attention of a loaded model."""
