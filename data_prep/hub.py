"""Data sets of the Hugging Face hub, or local directories in its layout, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def read_part(corpus: CorpusConfig, part: int, num_parts: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of part `part` of `num_parts`, in order.

    Of a record the fields `names` are read (a dot descends) and no others. A data set that does not say which columns
    it has is read with all of them.

    Raises:
        ValueError: the part cannot be read to its end; the message of `datasets` is kept.
    """
    records = iter(_with_fields(_open_corpus(corpus), names).shard(num_shards=num_parts, index=part))
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # datasets raises what its many readers raise, wrapped in its own types or not
            cause = error.__cause__ or error
            raise ValueError(f"cannot be read on ({type(cause).__name__}: {first_line(cause)})") from error
        if record is None:
            return
        yield record


def _with_fields(dataset: Any, names: Sequence[str]) -> Any:
    """The data set without the columns that nobody asks for, unless one that is asked for is missing."""
    present = dataset.column_names
    wanted = {name if name in (present or ()) else name.partition(".")[0] for name in names}
    return dataset.select_columns([name for name in present if name in wanted]) if present else dataset


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
