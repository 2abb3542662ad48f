"""LongBench (Bai et al. 2023, arXiv 2308.14508): data/*.jsonl or data.zip of THUDM/LongBench.

Prompts and metrics are those of lm-eval, which took them from the authors. Its prompts read `question` where the
published rows have `input`. Categories are the authors'; their average is the mean over categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clex_train.harness.benchmark import Group, Mean
from clex_train.utils.errors import require
from data_prep.benchmark.datasets import Dataset, require_found, require_known
from data_prep.benchmark.rows import Row, RowFile, require_columns, require_text, require_texts

CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
CATEGORY = {name: category for category, names in CATEGORIES.items() for name in names}
EXTENDED = (
    *("qasper_e", "multifieldqa_en_e", "hotpotqa_e", "2wikimqa_e", "gov_report_e", "multi_news_e", "trec_e"),
    *("triviaqa_e", "samsum_e", "passage_count_e", "passage_retrieval_en_e", "lcc_e", "repobench-p_e"),
)
"""LongBench-E: another sample of these tasks, even in length."""
TASKS = (*CATEGORY, *EXTENDED)
WITHOUT_CHAT = CATEGORIES["few-shot learning"] + CATEGORIES["code"]
"""The authors' pred.py gives these to chat models without a template."""
WITH_CLASSES = ("trec", "lsht")
NUM_ROWS = dict.fromkeys(CATEGORY, 200) | {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}
"""Published rows; those of LongBench-E are not known here."""
LONGBENCH = Group("LongBench", len(CATEGORY), Mean.categories)
LONGBENCH_E = Group("LongBench-E", len(EXTENDED), Mean.categories)
COLUMNS = ("context", "answers", "length", "dataset", "language", "all_classes", "_id")


def convert(files: Sequence[RowFile], tasks: Sequence[str]) -> Iterator[Dataset]:
    """Yield the tasks whose files are there, each file named as its data set."""
    require_known(tasks, TASKS)
    by_name: dict[str, RowFile] = {}
    for file in files:
        remedy = f"no data set of LongBench; it has {', '.join(TASKS)}"
        require(file.stem in TASKS, file.name, None, remedy)
        require(file.stem not in by_name, file.name, None, f"{file.stem} is in two places; name one")
        by_name[file.stem] = file
    require_found(tasks, by_name, files)
    for name in TASKS:
        if name in by_name and (not tasks or name in tasks):
            yield _dataset(name, by_name[name])


def _dataset(name: str, file: RowFile) -> Dataset:
    plain, rows = name.removesuffix("_e"), file.rows()
    # The copy at Xnhyacinth/LongBench has `question` already.
    asked = "question" if "question" in rows[0] else "input"
    require_columns(file, rows, (asked, "context", "answers", "all_classes"), COLUMNS)
    require_text(file, rows, (asked, "context"))
    require_texts(file, rows, "answers")
    if plain in WITH_CLASSES:
        require_texts(file, rows, "all_classes")
    others = {row.get("dataset", name) for row in rows} - {name, plain}
    require(not others, file.name, None, f"has rows of {', '.join(map(str, sorted(others)))}; is the name right?")
    return Dataset(
        published=name,
        name=f"longbench_{name}",
        source=file.name,
        group=LONGBENCH_E if name in EXTENDED else LONGBENCH,
        category=CATEGORY[plain],
        rows=[_row(row, asked) for row in rows],
        stock=f"longbench/{name}.yaml",
        counted=(len(rows), NUM_ROWS.get(name, len(rows))),
        in_chat=plain not in WITHOUT_CHAT,
    )


def _row(row: Row, asked: str) -> Row:
    kept = {key: row[key] for key in COLUMNS if key in row}
    return {"question": row[asked], **kept}
