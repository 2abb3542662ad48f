"""The names of all methods of scaling RoPE, for training (`scaling=`) and for evaluation (`evaluation.methods`).

This is the one list to extend for a new method. Its class lives in `scaling/methods/NAME.py`, which this package, a
layer below, does not import.
"""

from enum import Enum


class Method(Enum):
    """A way of scaling RoPE, trained with or read by."""

    trained = "trained"
    clex = "clex"
    none = "none"
    pi = "pi"
    ntk = "ntk"
    dynamic_ntk = "dynamic_ntk"
    yarn = "yarn"
    theta = "theta"
    longrope = "longrope"
    p_rope = "p_rope"
    cope = "cope"
    evq = "evq"
    static = "static"
    random_pos = "random_pos"
    lm_infinite = "lm_infinite"


EVALUATION_ONLY = (Method.trained, Method.lm_infinite)
"""Methods without training: the unchanged model, and LM-Infinite's mask."""
EVALUATED = tuple(method for method in Method if method is not Method.static)
"""Choices of `evaluation.methods`: without training there are no learned factors, and with it `trained` reads them."""
TRAINED_BY = tuple(method for method in Method if method not in EVALUATION_ONLY)
"""Choices of `scaling=`."""
FORMULAS = tuple(method for method in TRAINED_BY if method not in (Method.none, Method.clex))
"""Methods with one scale factor for the whole run, written into a stock config.json; `static` learns from there."""
LEARNED = (Method.clex, Method.static)
"""Methods with frequencies that are trained with the model."""
