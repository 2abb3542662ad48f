"""Error for a record that cannot be used; any other error of a reader is a bug, and not a fault of the corpus."""

from clex_train.utils.errors import InputError


class BadRecord(InputError):
    """A record, or the rest of a file, cannot be used; `remedy` is what the user can do about it."""

    def __init__(self, message: str, remedy: str = "repair it") -> None:
        super().__init__(message)
        self.remedy = remedy
