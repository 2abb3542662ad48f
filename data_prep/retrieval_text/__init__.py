"""Write synthetic retrieval documents for training, with filler from the training documents of a corpus."""
