"""Bounds of fields: the one form in which a value out of range is refused."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ValueError` in the one form users see for a value that is out of range."""
    if not condition:
        raise ValueError(f"{key}={value}: {remedy}")
