"""CLEX: frequencies as the solution of a learned ODE over t (Chen et al., arXiv 2310.16450).

The field and its table are in `scaling/clex.py`; a model saved with a field has the table as its own frequencies.
`scaling=clex` and `scaling=clex_paper` are two recipes of this method (conf/scaling/).
"""

from dataclasses import dataclass
from typing import ClassVar

from clex_train.scaling.methods.trained import Trained


@dataclass(frozen=True)
class ClexTable(Trained):
    """CLEX: the table that is stored with the field."""

    title: ClassVar[str] = "CLEX"


METHOD = ClexTable
