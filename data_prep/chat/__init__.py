"""Conversations: read, render with a chat template, and write with a mask of the tokens that the loss counts."""
