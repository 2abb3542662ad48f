"""The checker behind jaxtyping's shapes while testing: an int passes for a float, as for every other type checker."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
