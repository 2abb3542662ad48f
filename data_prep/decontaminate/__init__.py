"""Find and remove evaluation documents that are also in the training data."""
