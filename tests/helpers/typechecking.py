"""The runtime type checker for jaxtyping in tests: an int passes for a float, as in static type checkers."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
