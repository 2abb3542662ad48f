"""Choice of BOS at the beginning of documents, evaluation windows and prompts."""

from enum import Enum


class Bos(Enum):
    auto = "auto"
    always = "always"
    never = "never"
