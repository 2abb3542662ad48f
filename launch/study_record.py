"""Record of the study: every figure that its tables need, in one JSON file small enough to commit.

    collect(out) reads the evaluation files of all arms;  write, read;  the tables come from the record alone

Windows keep their summed NLL, rounded to 1e-3 nats, so that differences of two rows can be paired by book.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from clex_train.evaluation import results
from clex_train.evaluation.results import Results
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import write_atomically
from clex_train.utils.records import read_json
from launch.study_arms import ARMS, BASE_METHODS, CHOOSING, JUDGING, REFERENCE, TAX_AGAINST, TITLES, Arm, Windows

DIGITS = 3
Source = tuple[Arm, int, Windows, Path]
"""An arm, its seed, the windows, and the evaluation file."""


@dataclass(frozen=True)
class Share:
    """A ratio over prompts: exact answers of all, or nats of answer tokens."""

    total: float
    count: int


@dataclass(frozen=True)
class Entry:
    """One set of weights, read by one method on one selection of windows."""

    arm: str
    label: str
    seed: int
    windows: str
    method: str
    nll: dict[str, dict[int, list[float]]]
    """Protocol -> length in tokens -> [windows]: summed NLL in nats."""
    tokens: dict[str, int]
    """Protocol -> scored tokens of each window."""
    fingerprints: dict[str, str]
    """Protocol -> fingerprint of the scored tokens."""
    documents: list[int]
    """[windows]: book of each window."""
    measures: dict[str, dict[int, Share]]
    """`<measure>_<quantity>` -> length in tokens -> the mean over places and prompts."""


@dataclass(frozen=True)
class Record:
    """Everything that the tables show, and where it was made."""

    context_len: int
    made_by: dict[str, str]
    """Versions, commit, processor and data type of the first entry."""
    reference: str
    """Label of the row from which differences are counted."""
    tax_against: str
    """Label of the row from which the tax at 1x is counted: the base trained on as long."""
    entries: list[Entry]


def collect(out: Path, seeds: Sequence[int]) -> Record:
    """Collect the study on books."""
    return gather(files(out, seeds), REFERENCE, TAX_AGAINST)


def gather(found: Iterable[Source], reference: str, tax_against: str) -> Record:
    """Read the evaluations that exist; `ConfigError` names rows that scored other tokens."""
    entries, made_by, context_len = [], dict[str, str](), 0
    for arm, seed, windows, path in found:
        if not path.exists():
            continue
        scored, origin = results.read(path)
        made_by = made_by or {key: str(value) for key, value in sorted(origin.environment.items())}
        context_len = scored.context_len
        methods = dict.fromkeys(score.method for score in scored.scores)
        entries += [_entry(arm, seed, windows, method, scored) for method in methods]
    _require_same_tokens(entries)
    return Record(context_len, made_by, reference, tax_against, entries)


def files(out: Path, seeds: Sequence[int]) -> Iterable[Source]:
    """Yield every evaluation of the study, whether it exists or not."""
    base = Arm("base", "base", (), BASE_METHODS)
    runs = [(base, 0, out / "base"), *((arm, seed, out / arm.name / f"seed_{seed}") for arm in ARMS for seed in seeds)]
    for arm, seed, folder in runs:
        for windows in (CHOOSING, JUDGING):
            yield arm, seed, windows, folder / "evaluation" / f"{windows.name}.json"


def write(record: Record, path: Path) -> None:
    """Write a record, a line for each entry."""
    head = {name: getattr(record, name) for name in ("context_len", "made_by", "reference", "tax_against")}
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in record.entries)
    write_atomically(path, f'{json.dumps(head)[:-1]}, "entries": [\n{lines}\n]}}\n')


def read(path: Path) -> Record:
    """Read what `write` wrote; `ConfigError` names a file that is not a record."""
    try:
        return msgspec.convert(read_json(path), Record, strict=False)
    except (FileNotFoundError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError(path, None, f"not a record of the study ({error})") from error


def _entry(arm: Arm, seed: int, windows: Windows, method: str, found: Results) -> Entry:
    scores = [score for score in found.scores if score.method == method]
    protocols = dict.fromkeys(score.protocol for score in scores)
    documents = [int(document) for document in found.windows["documents"]]
    own = [score for score in found.measures if score.method == method]
    return Entry(
        arm=arm.name,
        label=arm.label if len(arm.methods) == 1 else f"{arm.label}, {TITLES[method]}",
        seed=seed,
        windows=windows.name,
        method=method,
        nll={
            protocol: {s.length: [round(nll, DIGITS) for nll in s.window_nll] for s in scores if s.protocol == protocol}
            for protocol in protocols
        },
        tokens={s.protocol: s.num_tokens // len(documents) for s in scores},
        fingerprints={s.protocol: s.fingerprint for s in scores},
        documents=documents,
        measures={
            name: {n: _pooled([s for s in own if s.length == n and _name(s) == name]) for n in _lengths(own, name)}
            for name in dict.fromkeys(map(_name, own))
        },
    )


def _name(score: results.MeasureScore) -> str:
    return f"{score.measure}_{score.quantity}"


def _lengths(scores: Sequence[results.MeasureScore], name: str) -> list[int]:
    return sorted({score.length for score in scores if _name(score) == name})


def _pooled(scores: Sequence[results.MeasureScore]) -> Share:
    total = sum(sum(score.sums) for score in scores)
    return Share(round(total, DIGITS), sum(sum(score.counts) for score in scores))


def _require_same_tokens(entries: Sequence[Entry]) -> None:
    # Paired differences need the same tokens in the same order.
    seen = dict[tuple[str, str], str]()
    for entry in entries:
        for protocol, fingerprint in entry.fingerprints.items():
            expected = seen.setdefault((entry.windows, protocol), fingerprint)
            if fingerprint != expected:
                remedy = "its runs scored different tokens; remove their evaluation files and run again"
                raise ConfigError(entry.label, None, remedy)
