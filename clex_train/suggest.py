"""What the user may have meant: names like a misspelt one."""

import difflib
from collections.abc import Sequence


def did_you_mean(key: str, keys: Sequence[str]) -> str:
    """`did you mean a, b or c?` for a dotted key among all that exist; empty if nothing comes near.

    The same field in another group comes first, then fields like it in the same group, then anything like it.
    """
    group, _, field = key.rpartition(".")
    elsewhere = [name for name in keys if name.rpartition(".")[2] == field]
    beside = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == group}
    nearby = [beside[name] for name in difflib.get_close_matches(field, beside, n=2, cutoff=0.6)]
    found = elsewhere or nearby or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f"did you mean {in_words(found)}?" if found else ""


def in_words(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(", ".join(names).rsplit(", ", 1))
