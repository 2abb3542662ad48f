"""Largest sensible values in a configuration; beyond them no machine could serve it."""

MOST_TOKENS = 2**27
"""Tokens of a sequence, window or prompt: at this length the KV cache of a 7B model takes 64 TiB."""
MOST_SCALE = 2**14
"""Scale factors: the ODE is solved at every integer up to t_max, some 15 s for this many on a CPU."""
MOST_ROPE_THETA = 1e12
MOST_STEPS = 10**9
MOST_RANKS = 2**20
