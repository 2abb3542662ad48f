"""Engines that serve a saved model, one module each: the length they serve, and their traps with the remedy."""
