"""Data sets of the Hugging Face hub, or local directories in the same layout, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from clex_train.utils.errors import ConfigError, first_line
from data_prep.config import CorpusConfig
from data_prep.corpus.bad_record import BadRecord


def num_shards(corpus: CorpusConfig) -> int:
    """Count the files of the data set, the maximum number of parts that it can be read in.

    Raises:
        ConfigError: there is no such data set, subset, split or revision, or the hub cannot be reached.
    """
    return int(_open_corpus(corpus).num_shards)


def read_part(
    corpus: CorpusConfig, part: int, num_parts: int, names: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the records of part `part` of `num_parts`, in order.

    Reads only the columns of `names` and `optional` (a dot descends).

    Raises:
        BadRecord: the part cannot be read to its end; the message of `datasets` is kept.
    """
    records = iter(_select(_open_corpus(corpus), names, optional).shard(num_shards=num_parts, index=part))
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # datasets raises the errors of its many readers, wrapped in its own types or not
            cause = error.__cause__ or error
            raise BadRecord(f"reading failed ({type(cause).__name__}: {first_line(cause)})") from error
        if record is None:
            return
        yield record


def _select(dataset: Any, names: Sequence[str], optional: Sequence[str]) -> Any:
    """Drop unneeded columns, unless one of `names` is missing."""
    # None if the data set does not declare its columns; then, as if one of `names` is missing, read all of them, so
    # that the error about a missing field can list what there is.
    present = dataset.column_names or []
    required, others = (
        {name if name in present else name.partition(".")[0] for name in group} for group in (names, optional)
    )
    if not required.issubset(present):
        return dataset
    return dataset.select_columns([name for name in present if name in required | others])


def _open_corpus(corpus: CorpusConfig) -> Any:
    return _open(str(corpus.hub), corpus.hub_subset, corpus.hub_split, corpus.hub_revision)


@lru_cache(maxsize=1)
def _open(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # see `read_part`
        raise ConfigError(
            "corpus.hub",
            f"{name} (subset {subset}, split {split}, revision {revision})",
            f"{first_line(error)}; check the name and the network, or name a local directory in the same layout",
        ) from error
