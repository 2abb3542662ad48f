"""Read corpora: formats, compression, hub data sets, text fields, and the split into training and validation."""
