"""The page of a demo: tables, figures, a generated text, and the command and time of every stage."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clex_train.evaluation.tables import Row, Table, markdown
from clex_train.report.evidence import from_rows
from clex_train.report.write import write as write_report
from clex_train.tracking import environment
from clex_train.utils import files
from launch.demo_plan import Size
from launch.demo_records import Records

ROWS = [
    ("untrained, plain RoPE", "untrained", "none"),
    ("untrained, NTK(2t-1)", "untrained_ntk", "ntk"),
    ("untrained, YaRN", "untrained", "yarn"),
    ("untrained, LM-Infinite", "untrained_lm_infinite", "lm_infinite"),
    ("plain training (control), YaRN", "plain", "yarn"),
    ("CLEX", "clex", "trained"),
    ("untrained, YaRN", "untrained_far", "yarn"),
    ("plain training (control), YaRN", "plain_far", "yarn"),
    ("CLEX", "clex_far", "trained"),
]
"""Label, evaluation and method of each row; a row of an evaluation that was left out is left out."""
PAGE = "index.md"


def write(size: Size, records: Records, left_out: list[str]) -> str:
    """Write the page and its report, and return the text for the console."""
    evaluations = size.folder / "evaluation"
    rows = [(label, evaluations / f"{name}.json", method) for label, name, method in ROWS]
    evidence = from_rows([Row(label, path, method, "last_k") for label, path, method in rows if path.exists()])
    report = size.folder / "report"
    console = write_report(evidence, report, [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    sections = [
        opening(size, records.read()),
        "## Perplexity\n\n" + markdown(evidence.tables).strip(),
        "## CLEX against the control\n\n" + "\n".join(comparison(evidence.tables)),
        figures(report),
        sample(size.folder / "generated.json"),
        "## Left out\n\n" + ("\n".join(f"- {line}" for line in left_out) or "Nothing."),
        commands(records),
    ]
    files.write_atomically(size.folder / PAGE, "\n\n".join(sections) + "\n")
    minutes = records.spent() / 60
    return f"\n{console}\n\n{minutes:.1f} minutes in all stages; the page: {size.folder / PAGE}"


def opening(size: Size, content: dict[str, Any]) -> str:
    """Describe what ran, and on which machine."""
    speeds = ", ".join(f"{speed:g} GFLOP/s in {name}" for name, speed in content["gflops"].items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    smoke = "" if not size.is_smoke else "**A smoke run: L is said to be less, and no number means anything.**\n\n"
    return (
        "# A pretrained model extended on a CPU\n\n"
        f"{smoke}SmolLM2-135M-Instruct (4-bit weights, dequantised), L = {size.context_len:,} tokens. "
        f"Control and CLEX: {content['steps']} steps of 2 rows of {size.seq_len} tokens, one seed. Judged on "
        f"{size.windows} window of books that no training saw: one window has no standard error, so small differences "
        "mean nothing.\n\n"
        f"{cpu()}, {os.cpu_count()} cores; precision {content['precision']} (products: {speeds}); "
        f"{versions}; commit {environment.git_commit() or 'not recorded'}."
    )


def comparison(tables: list[Table]) -> Iterator[str]:
    """Yield a line for each length: CLEX against the better reading of the control, and both against no training."""
    for table in tables:
        curves = {curve.label: curve.perplexity for curve in table.curves}
        for length in table.lengths:
            found = {label: values[length] for label, values in curves.items() if length in values}
            line = [f"- {length:,} tokens:"]
            for name in ("plain training", "untrained"):
                others = {label: value for label, value in found.items() if label.startswith(name)}
                if "CLEX" not in found or not others:
                    continue
                best = min(others, key=lambda label: others[label])
                change = 100 * (found["CLEX"] / others[best] - 1)
                line.append(f"CLEX is {abs(change):.1f} % {'worse' if change > 0 else 'better'} than {best};")
            if len(line) > 1 and math.isfinite(found["CLEX"]):
                yield " ".join(line).removesuffix(";") + "."


def figures(report: Path) -> str:
    """Link the figures of the report."""
    images = "\n\n".join(f"![{file.stem}](report/{file.name})" for file in sorted(report.glob("*.png")))
    return f"## Figures\n\nThe source of every number: [report](report/index.html).\n\n{images}"


def sample(path: Path) -> str:
    """Show how llama.cpp continues the book; one line where that part was left out."""
    title = "## A text continued beyond L in llama.cpp\n\n"
    if not path.exists():
        return f"{title}Left out, see below."
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = {
        f"The prompt, {found['prompt_tokens']:,} tokens, ends": found["prompt_end"],
        "llama.cpp continues, greedily": found["text"],
        "The book continues": found["book"],
    }
    quoted = "\n\n".join(f"{name}:\n\n> {' '.join(text.split())}" for name, text in parts.items())
    facts = f"The GGUF file states a context of {found['context']:,} tokens. {found['seconds']:.0f} s."
    return f"{title}{facts}\n\n{quoted}"


def commands(records: Records) -> str:
    """List each stage with its time and its command."""
    found = records.read()["stages"]
    listed = "\n\n".join(f"{title}, {each['seconds']:.0f} s:\n\n    {each['command']}" for title, each in found.items())
    return f"## Commands\n\n{records.spent() / 60:.1f} minutes in all.\n\n{listed}"


def cpu() -> str:
    """Return the processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
