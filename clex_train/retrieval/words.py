"""Meaningless names, numbers and UUIDs for keys and values of retrieval prompts."""

from collections.abc import Iterator
from itertools import count

import numpy as np

_ADJECTIVES = """
able acid amber ample antique arid autumn azure bitter blank blunt bold brave brief bright brisk broad calm civil
clever cold copper coral cosmic crimson crisp curious damp dark deep dense distant dry dusty eager early eastern
elder empty even faint fair fast final firm flat foggy fond frosty gentle giant golden grand green grim hollow
honest humble icy idle inner iron ivory keen kind large late lazy lean light lofty lone loud lucky lunar
"""
_NOUNS = """
anchor apple arrow badge barrel basin basket beacon bell bench bottle bridge brush bucket button cabin camel candle
canyon carpet castle cedar chair circle clock cloud coast comet cottage crane crown curtain desert door drum eagle
engine falcon fence ferry field flute forest fountain garden garment glove grain hammer harbor hat helmet hill
island jacket kettle kite ladder lake lamp lantern lemon letter meadow mirror mountain needle ocean orchard paddle
palace pencil pepper piano pillow planet pocket pond quarry
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def names(rng: np.random.Generator) -> Iterator[str]:
    """Yield distinct names without end, in random order."""
    # About 6,000 adjective-noun pairs first, then `noun-and-noun`, then the same with numbers: the common-words task
    # needs tens of thousands of names for its longest prompts.
    for index in rng.permutation(len(ADJECTIVES) * len(NOUNS)).tolist():
        yield f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"
    for round_ in count():
        for index in rng.permutation(len(NOUNS) ** 2).tolist():
            pair = f"{NOUNS[index // len(NOUNS)]}-and-{NOUNS[index % len(NOUNS)]}"
            yield f"{pair}-{round_}" if round_ else pair


def digits(rng: np.random.Generator, num_digits: int) -> str:
    """Draw a number of `num_digits` digits."""
    # Never a leading zero, which a model may drop.
    return str(rng.integers(10 ** (num_digits - 1), 10**num_digits))


def uuid(rng: np.random.Generator) -> str:
    """Draw a UUID."""
    # Not `uuid.uuid4`, which takes no generator.
    text = rng.bytes(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def enumerated(items: list[str]) -> str:
    """Join items as `a`, `a and b`, `a, b and c`."""
    return " and ".join([part for part in (", ".join(items[:-1]), items[-1]) if part])
