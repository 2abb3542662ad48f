"""Choice of BOS at the beginning of documents, evaluation windows and prompts."""

from enum import Enum


class Bos(Enum):
    """Choices of whether documents begin with the BOS token."""

    auto = "auto"
    always = "always"
    never = "never"
