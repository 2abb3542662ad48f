"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): data.json of THUDM/LongBench-v2, 503 questions with four choices.

lm-eval asks for the likelihood of the four letters, the authors for a generated sentence, so their published numbers
are near, not equal. Its tasks are the sub-domains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from clex_train.harness.benchmark import Group, Mean
from clex_train.utils.errors import ConfigError, require
from data_prep.benchmark.datasets import Dataset, require_found, require_known
from data_prep.benchmark.rows import Row, RowFile, require_columns, require_text

SUBDOMAINS = {
    ("single-document QA", "academic"): ("academic_single", "academic_single"),
    ("single-document QA", "literary"): ("lit_single", "lit_single_doc"),
    ("single-document QA", "legal"): ("legal_single", "legal_single"),
    ("single-document QA", "financial"): ("fin_single", "fin_single_doc"),
    ("single-document QA", "governmental"): ("govt_single", "govt_single_doc"),
    ("single-document QA", "detective"): ("detective", "detective"),
    ("single-document QA", "event ordering"): ("event_order", "event_order"),
    ("multi-document QA", "academic"): ("academic_multi", "academic_multi_doc"),
    ("multi-document QA", "legal"): ("legal_multi", "legal_multi"),
    ("multi-document QA", "financial"): ("fin_multi", "fin_multi_doc"),
    ("multi-document QA", "governmental"): ("govt_multi", "govt_multi_doc"),
    ("multi-document QA", "multi-news"): ("news_multi", "news_multi"),
    ("long in-context learning", "user guide QA"): ("user_guide", "user_guide"),
    ("long in-context learning", "new language translation"): ("translate", "translate"),
    ("long in-context learning", "many-shot learning"): ("many_shot", "many_shot"),
    ("long-dialogue history understanding", "agent history QA"): ("agent_history", "agent_history"),
    ("long-dialogue history understanding", "dialogue history QA"): ("dialogue_history", "dialogue_history"),
    ("code repository understanding", "code repo QA"): ("code", "longbench2_code"),
    ("long structured data understanding", "table QA"): ("table", "table"),
    ("long structured data understanding", "knowledge graph reasoning"): ("graph", "graph"),
}
"""Domain and sub-domain -> lm-eval's task behind `longbench2_`, and its file."""
NUM_ROWS = 503
COLUMNS = ("domain", "sub_domain", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context")
KEPT = ("_id", "difficulty", "length", "question", "answer", "context")
GROUP = Group("LongBench v2", len(SUBDOMAINS), Mean.rows)


def convert(files: Sequence[RowFile], tasks: Sequence[str]) -> Iterator[Dataset]:
    """Yield the sub-domains of data.json."""
    require_known(tasks, [name for name, _ in SUBDOMAINS.values()])
    names = ", ".join(file.name for file in files)
    require(len(files) == 1, "paths", names, "LongBench v2 is one file, data.json; name it")
    (file,) = files
    rows = file.rows()
    require_columns(file, rows, COLUMNS, ("_id", "difficulty", "length"))
    require_text(file, rows, COLUMNS)
    places = {(_plain(domain), _plain(sub)): key for key in SUBDOMAINS for domain, sub in [key]}
    by_place: dict[tuple[str, str], list[Row]] = {}
    for number, row in enumerate(rows, 1):
        place = places.get((_plain(row["domain"]), _plain(row["sub_domain"])))
        if place is None:
            unknown = f"{row['domain']} / {row['sub_domain']} of row {number} is no sub-domain of LongBench v2"
            raise ConfigError(file.name, None, f"{unknown}; known are {', '.join(sub for _, sub in SUBDOMAINS)}")
        require(
            row["answer"] in "ABCD", file.name, None, f"answer of row {number} is {row['answer']}, not A, B, C or D"
        )
        by_place.setdefault(place, []).append(_row(row))
    require_found(tasks, [SUBDOMAINS[place][0] for place in by_place], files)
    # The published number is of the whole file, so the first task answers for it.
    counted: tuple[int, int] | None = (len(rows), NUM_ROWS)
    for place, (name, stock) in SUBDOMAINS.items():
        if place in by_place and (not tasks or name in tasks):
            yield Dataset(
                published=name,
                name=f"longbench2_{name}",
                source=file.name,
                group=GROUP,
                category=place[0],
                rows=by_place[place],
                stock=f"longbench2/{stock}.yaml",
                split="train",
                counted=counted,
            )
            counted = None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.casefold()).strip()


def _row(row: Row) -> Row:
    choices = [row[f"choice_{letter}"] for letter in "ABCD"]
    kept: Row = {key: row[key] for key in KEPT if key in row}
    return kept | {"choices": choices}
