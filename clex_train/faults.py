"""What ends a run before its last step, each with its own exit code."""


class RunStopped(RuntimeError):
    """Training was stopped to protect what it has: the message says why, what is safe, and what to do."""


class StopRequested(RuntimeError):
    """The run was asked to stop and has saved what it had: the same command goes on. Every rank raises it."""


class RankLost(RuntimeError):
    """A rank died, froze or hangs, so that the others cannot go on: the message says which and what it was doing."""

    exit_code = 4
