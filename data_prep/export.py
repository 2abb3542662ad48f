"""`corpus`: write any corpus as one file of {"text", "meta"} lines, the layout of RedPajama."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from clex_train.utils import log
from data_prep.config import CorpusVerb
from data_prep.corpus.documents import documents, require_documents
from data_prep.corpus.sources import Unit, plan
from data_prep.corpus.utf8 import printable
from data_prep.line_file import line_file
from data_prep.resume import disk_full_explained, require_free

logger = log.get(__name__)


def run(config: CorpusVerb) -> None:
    """Write the file under a temporary name and rename it when it is complete.

    Raises:
        InputError: the corpus cannot be read, or the output exists or is not writable.
    """
    output = Path(config.output)
    require_free(output, "file", config.overwrite)
    # One unit of everything: the output is a single file, and its order must not depend on sharding.
    units = plan(config.corpus, 1 << 62)
    with disk_full_explained(output):
        _write(output, units, config)


def _write(output: Path, units: list[Unit], config: CorpusVerb) -> None:
    counts: Counter[str] = Counter()
    with line_file(output) as write:
        for piece in (piece for unit in units for piece in unit.pieces):
            for document in documents(piece, config.corpus, counts, keep=["meta"]):
                origin = {"path": printable(piece.path)}
                write({"text": document.text, "meta": document.fields.get("meta", origin)})
        require_documents(config.corpus, counts)
    logger.info("%s is complete: %d documents", output, counts["documents"])
