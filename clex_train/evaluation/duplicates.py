"""Recognize cells that are equal by definition, so that one of them is computed and the others are copies.

Two methods give the same scores if they rotate by the same frequencies and use the same mask: at N <= L `none`, `clex`,
`ntk` and `pi` are all plain RoPE. Frequencies are the same only if they agree to the bit.
"""

from collections.abc import Collection, Iterable

from clex_train.scaling.frequency_table import Frequencies

Identity = tuple[object, ...]


def identity(
    method: str, table: Frequencies, lengths: Iterable[int], context_len: int, inserted: Collection[str]
) -> Identity:
    """Return a key of a method's effect at these numbers of tokens; equal keys give equal scores.

    `inserted` are the methods that install changes besides a table; none of them equals another method.
    """
    found = [table.least_upper_bound(num_tokens, context_len) for num_tokens in lengths]
    spectra = tuple((each.inv_freq.detach().cpu().numpy().tobytes(), each.attention_factor) for each in found)
    return (method if method in inserted else "", spectra)
