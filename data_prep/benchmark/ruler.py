"""RULER (Hsieh et al. 2024, arXiv 2404.06654): prompts made by NVIDIA/RULER, <length>/data/<task>/validation.jsonl.

Prompts are the rows' own, answers are as long as RULER's, metrics are RULER's (`clex_train.harness.ruler_scores`).
Make the prompts for a base model (`--model_template_type base`): `chat_template=true` adds the model's own template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clex_train.harness.benchmark import Group, Mean
from clex_train.utils.errors import require
from data_prep.benchmark.datasets import Dataset, require_found, require_known
from data_prep.benchmark.rows import RowFile, require_columns, require_text, require_texts

NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
ANSWER_TOKENS = {f"niah_{name}": 128 for name in NEEDLES} | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
CATEGORY = {"niah": "retrieval", "vt": "multi-hop tracing", "cwe": "aggregation", "fwe": "aggregation", "qa": "QA"}
"""The paper's category of the first word of a task's name."""
SCORES = "clex_train.harness.ruler_scores"
KNOWN = ("index", "length", "length_w_model_temp", "answer_prefix", "token_position_answer", "truncation", "others")


def convert(files: Sequence[RowFile], tasks: Sequence[str]) -> Iterator[Dataset]:
    """Yield a task for each file: its folder is the task's name, a folder above is the length."""
    require_known(tasks, ANSWER_TOKENS)
    places = [(_length(file), _task(file), file) for file in files]
    require_found(tasks, [name for _, name, _ in places], files)
    seen: set[tuple[int, str]] = set()
    for length, name, file in sorted(places, key=lambda place: (place[0], [*ANSWER_TOKENS].index(place[1]))):
        require((length, name) not in seen, file.name, None, f"{name} of {length} tokens is in two places; name one")
        seen.add((length, name))
        if not tasks or name in tasks:
            yield _dataset(length, name, file)


def _task(file: RowFile) -> str:
    name = file.parts[-2] if file.stem in ("validation", "test") and len(file.parts) > 1 else file.stem
    known = ", ".join(ANSWER_TOKENS)
    remedy = f"is in no folder named as a task; expected <length>/data/<task>/validation.jsonl, with a task of {known}"
    require(name in ANSWER_TOKENS, file.name, None, remedy)
    return name


def _length(file: RowFile) -> int:
    lengths = [int(part) for part in file.parts[:-1] if part.isdecimal()]
    remedy = "is below no folder named as a length in tokens; expected <length>/data/<task>/validation.jsonl"
    require(len(lengths) > 0, file.name, None, remedy)
    return lengths[-1]


def _dataset(length: int, name: str, file: RowFile) -> Dataset:
    rows = file.rows()
    require_columns(file, rows, ("input", "outputs"), KNOWN)
    require_text(file, rows, ("input",))
    require_texts(file, rows, "outputs")
    kept = [{key: row.get(key, "") for key in ("index", "input", "outputs", "answer_prefix")} for row in rows]
    # Newer versions of RULER give the beginning of the answer apart, so that it can follow a chat template.
    begun = {"gen_prefix": "{{answer_prefix}}"} if any(row["answer_prefix"] for row in kept) else {}
    return Dataset(
        published=name,
        name=f"ruler_{name}_{length}",
        source=file.name,
        group=Group(f"RULER {length}", len(ANSWER_TOKENS), Mean.tasks),
        category=CATEGORY[name.partition("_")[0]],
        rows=kept,
        fields={
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            **begun,
            "target_delimiter": "",
            "generation_kwargs": {"do_sample": False, "max_gen_toks": ANSWER_TOKENS[name], "until": []},
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        },
        scores=f"{SCORES}.{'any_of' if name.startswith('qa') else 'every'}",
    )
