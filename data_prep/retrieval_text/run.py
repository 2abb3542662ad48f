"""`retrieval_text`: write synthetic retrieval documents as JSON lines, to tokenize and mix into training at a share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clex_train.utils import log
from clex_train.utils.errors import require
from data_prep.corpus.sources import plan
from data_prep.line_file import line_file
from data_prep.resume import disk_full_explained, require_free, require_writable
from data_prep.retrieval_text import filler
from data_prep.retrieval_text.config import RetrievalTextVerb
from data_prep.retrieval_text.draft import Retrieval, draft
from data_prep.tokenize.encoding import load_tokenizer

logger = log.get(__name__)


def run(config: RetrievalTextVerb) -> None:
    """Write the file under a temporary name and rename it when it is complete.

    Raises:
        InputError: the corpus cannot be read or has too little text, or the output exists or is not writable.
    """
    output = Path(config.output)
    require_free(output, "file", config.overwrite)
    units = plan(config.corpus, 1 << 62)
    fits = _length_check(config)
    with disk_full_explained(output):
        require_writable(output)
        source = filler.read(config.corpus, units, config.max_mb * 1_000_000)
        # Less text would fill a document with repetitions of itself.
        require(
            source.num_bytes >= config.max_chars,
            "max_chars",
            config.max_chars,
            f"the training documents have only {source.num_bytes} bytes; add text or lower it",
        )
        num_chars = 0
        with line_file(output) as write:
            for number in range(config.num_documents):
                document = draft(number, config, source, fits)
                write(_record(number, document))
                num_chars += len(document.text)
    logger.info("%s is complete: %d documents, %.1f million characters", output, config.num_documents, num_chars / 1e6)


def _length_check(config: RetrievalTextVerb) -> Callable[[str], bool]:
    """Return a function that compares a text with `max_tokens`; every text passes without a limit."""
    most, path = config.max_tokens, config.tokenizer.path
    if most is None or path is None:
        return lambda text: True
    backend = load_tokenizer(path, config.tokenizer.trust_remote_code).backend_tokenizer
    # As in a store, where a special token in a text is plain text.
    backend.encode_special_tokens = True
    # 2 for BOS and EOS, whether or not the store will have a BOS.
    return lambda text: len(backend.encode(text, add_special_tokens=False).ids) + 2 <= most


def _record(number: int, document: Retrieval) -> dict[str, object]:
    meta = {
        "number": number,
        "kind": document.kind.value,
        "answer": document.answer,
        "distance": document.distance,
        "sources": list(document.sources),
    }
    return {"text": document.text, "meta": meta}
