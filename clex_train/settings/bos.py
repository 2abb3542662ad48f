"""Whether texts begin with the tokenizer's BOS."""

from enum import Enum


class Bos(Enum):
    auto = "auto"
    always = "always"
    never = "never"
