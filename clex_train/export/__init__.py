"""A trained model in the layout of another program."""
