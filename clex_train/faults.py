"""A run that cannot go on: the one exception that ends training after it has begun, with its own exit code."""


class RunStopped(RuntimeError):
    """Training was stopped to protect what it has: the message says why, what is safe, and what to do."""
