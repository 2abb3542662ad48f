"""Report of `decontaminate`: report.json with every pair, report.md to read, and a summary for the console."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clex_train.token_store.store import TokenStore
from clex_train.utils.files import write_atomically
from data_prep.config import DecontaminateVerb
from data_prep.decontaminate.contamination import Findings, Pair

SHOWN_PAIRS = 200
"""Pairs listed in report.md."""
NEAREST = 10
"""Pairs below the limits that are listed, to judge whether the limits fit the data."""
_OPERATION = ("train", "evaluation", "output", "report", "overwrite", "workers", "index_mb")
"""Keys that do not affect the result; stores are recorded by content instead of by path."""


@dataclass(frozen=True)
class Report:
    """Stores, settings and findings; `wordless`: evaluation documents that cannot be compared."""

    train: TokenStore
    evaluation: TokenStore
    config: DecontaminateVerb
    findings: Findings
    wordless: list[int]

    @cached_property
    def contaminated(self) -> list[int]:
        """Evaluation documents of at least one contaminated pair, ascending."""
        return sorted({pair.evaluation_doc for pair in self.findings.offending})

    @property
    def nearest(self) -> list[Pair]:
        """Most similar pairs below the limits, at most one for each evaluation document."""
        # The document number breaks ties, so that the report is the same for any number of workers.
        pairs = sorted(self.findings.nearest.values(), key=lambda pair: (-pair.similarity, pair.evaluation_doc))
        return pairs[:NEAREST]

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the result: the limits and the content of both stores."""
        # Settings are compared between runs, so keys without effect on the result must not count.
        limits = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in _OPERATION}
        return limits | {"train": _described(self.train), "evaluation": _described(self.evaluation)}

    def left_out(self) -> list[dict[str, Any]]:
        """List for each contaminated document the rules that found it and the most similar training document."""
        strongest: dict[int, Pair] = {}
        rules: dict[int, Counter[str]] = {}
        # Only the strongest pair: boilerplate can pair one document with thousands.
        for pair in self.findings.offending:
            doc = pair.evaluation_doc
            rules.setdefault(doc, Counter()).update(pair.rules)
            if doc not in strongest or _strength(pair) > _strength(strongest[doc]):
                strongest[doc] = pair
        return [
            {
                "document": doc,
                "origin": origin(self.evaluation, doc),
                "pairs_by_rule": dict(rules[doc]),
                "strongest": self._row(strongest[doc]),
            }
            for doc in self.contaminated
        ]

    def to_json(self) -> str:
        """Serialize the complete report."""
        content = {
            "settings": self.settings(),
            "counts": self._counts(),
            "contaminated": self.left_out(),
            "pairs": [self._row(pair) for pair in self.findings.offending],
            "nearest_below_the_limits": [self._row(pair) for pair in self.nearest],
            "evaluation_documents_without_words": [
                {"document": doc, "origin": origin(self.evaluation, doc)} for doc in self.wordless
            ],
        }
        # ensure_ascii=False keeps file names in any script readable.
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def summary(self) -> list[str]:
        """Return the lines for the console."""
        counts = self._counts()
        lines = [
            f"{counts['evaluation_documents']:,} evaluation documents against {counts['train_documents']:,} training "
            f"documents: {counts['contaminated_documents']:,} contaminated, {counts['pairs']:,} pairs"
        ]
        lines += [f"  by {rule}: {number:,} pairs" for rule, number in counts["pairs_by_rule"].items()]
        if self.nearest:
            pair = self.nearest[0]
            lines.append(
                f"  the most similar pair below the limits: similarity {pair.similarity:.3f}, "
                f"containment {pair.containment:.3f}"
            )
        if self.wordless:
            lines.append(f"  {len(self.wordless):,} evaluation documents have no words and could not be compared")
        return lines

    def to_markdown(self) -> str:
        """Format the report for reading, with the first pairs only if there are many."""
        pairs = self.findings.offending
        shown = f", the first {SHOWN_PAIRS} (all are in report.json)" if len(pairs) > SHOWN_PAIRS else ""
        lines = ["# Evaluation documents in the training documents", ""]
        lines += [*self.summary(), "", "## Settings", ""]
        lines += [f"- {key}: {value}" for key, value in self.settings().items()]
        lines += ["", f"## Contaminated pairs{shown}", "", *self._table(pairs[:SHOWN_PAIRS])]
        lines += ["", "## Nearest pairs below the limits", "", *self._table(self.nearest)]
        if self.wordless:
            lines += ["", "## Evaluation documents without words, not compared", ""]
            lines += [f"- {doc}: {origin(self.evaluation, doc)}" for doc in self.wordless]
        return "\n".join(lines) + "\n"

    def _counts(self) -> dict[str, Any]:
        return {
            "evaluation_documents": self.evaluation.num_documents,
            "train_documents": self.train.num_documents,
            "contaminated_documents": len(self.contaminated),
            "pairs": len(self.findings.offending),
            "pairs_by_rule": dict(sorted(Counter(r for pair in self.findings.offending for r in pair.rules).items())),
            "evaluation_documents_without_words": len(self.wordless),
            "train_documents_without_words": self.findings.wordless,
        }

    def _row(self, pair: Pair) -> dict[str, Any]:
        # JSON has only string keys.
        sizes = [str(n) for n in self.config.ngrams]
        return dataclasses.asdict(pair) | {
            "jaccard": dict(zip(sizes, pair.jaccard, strict=True)),
            "contained": dict(zip(sizes, pair.contained, strict=True)),
            "evaluation_origin": origin(self.evaluation, pair.evaluation_doc),
            "train_origin": origin(self.train, pair.train_doc),
        }

    def _table(self, pairs: list[Pair]) -> list[str]:
        if not pairs:
            return ["None."]
        sizes = ", ".join(map(str, self.config.ngrams))
        head = f"| evaluation | training | similarity (n = {sizes}) | containment (n = {sizes}) | MinHash | rules |"
        return [head, "|---|---|---|---|---|---|", *map(self._line, pairs)]

    def _line(self, pair: Pair) -> str:
        cells = [
            f"{pair.evaluation_doc}: {origin(self.evaluation, pair.evaluation_doc)}",
            f"{pair.train_doc}: {origin(self.train, pair.train_doc)}",
            f"{pair.similarity:.3f} ({', '.join(f'{v:.3f}' for v in pair.jaccard)})",
            f"{pair.containment:.3f} ({', '.join(f'{v:.3f}' for v in pair.contained)})",
            "" if pair.minhash is None else f"{pair.minhash:.2f}",
            ", ".join(pair.rules),
        ]
        # A bar in a file name would end the cell.
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md."""
    # File names may contain bytes that are not UTF-8; they are written as escapes.
    write_atomically(folder / "report.json", report.to_json().encode("utf-8", "backslashreplace"))
    write_atomically(folder / "report.md", report.to_markdown().encode("utf-8", "backslashreplace"))


def origin(store: TokenStore, doc_id: int) -> str:
    """Describe the origin of a document, or give its number if the store has no sources."""
    return store.origin(doc_id) if store.manifest.sources else f"document {doc_id}"


def _strength(pair: Pair) -> float:
    return max(pair.similarity, pair.containment)


def _described(store: TokenStore) -> dict[str, Any]:
    return {
        "path": str(store.path),
        "split": store.split_name,
        "fingerprint": store.fingerprint,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
    }
