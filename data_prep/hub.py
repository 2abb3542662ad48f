"""Data sets of the Hugging Face hub, or local directories in its layout, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from clex_train.faults import first_line
from data_prep.config import CorpusConfig


def num_shards(corpus: CorpusConfig) -> int:
    """Files that the data set consists of: the most parts it can be read in.

    Raises:
        ValueError: no such data set, subset, split or revision, or the hub cannot be reached.
    """
    return int(_open_corpus(corpus).num_shards)


def read_part(corpus: CorpusConfig, part: int, num_parts: int) -> Iterator[dict[str, Any]]:
    """Yield the records of part `part` of `num_parts`, in order.

    Raises:
        ValueError: the part cannot be read to its end; the message of `datasets` is kept.
    """
    records = iter(_open_corpus(corpus).shard(num_shards=num_parts, index=part))
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # datasets raises what its many readers raise, wrapped in its own types or not
            cause = error.__cause__ or error
            raise ValueError(f"cannot be read on ({type(cause).__name__}: {first_line(cause)})") from error
        if record is None:
            return
        yield record


def _open_corpus(corpus: CorpusConfig) -> Any:
    return _open(str(corpus.hub), corpus.hub_subset, corpus.hub_split, corpus.hub_revision)


@lru_cache(maxsize=1)
def _open(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # as above
        raise ValueError(
            f"corpus.hub={name} (subset {subset}, split {split}, revision {revision}): {first_line(error)}; check the "
            "name and the network, or name a local directory in the hub's layout"
        ) from error
