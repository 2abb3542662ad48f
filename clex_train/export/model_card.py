"""README.md of a saved model: what its config.json says, for whom, and what it costs.

The model card of an export, and the short one of a `final/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clex_train.export.factors import FixedRope

READS = "`clex_train.load_for_evaluation(ModelConfig(path=...))` and `apply_clex(model, path)`"


@dataclass(frozen=True)
class Measured:
    """Perplexity of the run at one length."""

    length: int
    t: float
    """Scale factor that the product used at this length."""
    protocol: str
    perplexity: float


def final_card(context_len: int, stated: dict[str, Any]) -> str:
    """Describe a `final/` in a page: the steps that it averages, the t of its config.json, or why there is none."""
    length, t = context_len, stated["stated_t"]
    lines = [
        "# A model trained with CLEX",
        "",
        *_average_lines(stated["averaged"] or ()),
        f"The base model was trained on L = {length:,} tokens. {READS} read",
    ]
    lines += ["this directory with its field: t then follows the length of each call.", ""]
    if t is None:
        lines += ["Other programs refuse to build it, since no stock config.json expresses it:", ""]
        return "\n".join([*lines, f"> {stated['unstated']}", ""])
    lines += [
        f"`config.json` states the model at the one scale factor t = {t:g} (`scaling.final_t` of the run). In",
        f"transformers it serves up to {round(t * length):,} tokens. Prompts that fit a smaller t lose",
        "some quality there. `python -m clex_train.cli.export` writes directories for another t, and folds",
        "log-scaling into the weights instead of the rotary embedding.",
        "",
    ]
    return "\n".join(lines)


def average_card(steps: Sequence[int]) -> str:
    """Describe the averaged model of a run without CLEX."""
    return "\n".join(["# The mean of checkpoints of a run", "", *_average_lines(steps)])


def _average_lines(steps: Sequence[int]) -> list[str]:
    if not steps:
        return []
    return [
        f"Its weights are the mean of the run's checkpoints at steps {', '.join(f'{step:,}' for step in steps)}.",
        "",
    ]


def export_card(facts: dict[str, Any], rope: FixedRope, measured: Sequence[Measured], runs_in: str) -> str:
    """Describe an export; `facts` is the content of `clex_export.json`, `runs_in` names what reads it."""
    lines = [
        f"# {facts['model_type']} at one scale factor, t = {rope.t:g}",
        "",
        f"Exported by clex-train. {runs_in} runs it, without code of ours.",
        "",
        "| | |",
        "|---|---|",
        f"| t | {rope.t:g} |",
        f"| L, context of the base model | {rope.context_len:,} tokens |",
        f"| longest context | {rope.served_len:,} tokens |",
        f"| method | {facts['method']} |",
        f"| digest of the field | {facts['digest'] or 'none'} |",
        f"| source | {facts['source']} |",
        f"| log-scaling | {_log_scale_line(facts)} |",
        "",
        "## Perplexity by length",
        "",
        *_perplexities(facts, measured),
        "",
        "## Short prompts",
        "",
        f"The frequencies are those of t = {rope.t:g} at every length. A prompt that fits a smaller t, above all one",
        f"of {rope.context_len:,} tokens or fewer, reads frequencies stretched further than it needs, and loses some",
        "quality against the model that lets t follow the length. Where most requests are short, serve them from an",
        "export of the least t that fits.",
        "",
    ]
    return "\n".join(lines)


def _log_scale_line(facts: dict[str, Any]) -> str:
    if facts["log_scale"] == "off":
        return f"none (policy of the run: {facts['log_scale_of_run']})"
    return f"the constant {facts['scale']:.6g} of {facts['scale_len']:,} tokens, folded into the weights"


def _holds(each: Measured, facts: dict[str, Any]) -> bool:
    """Return True if an export has the t and the log-scaling with which a perplexity was measured."""
    # `chunked` raises t within a window.
    same_t = each.t == facts["t"] and each.protocol != "chunked"
    is_scaled = facts["log_scale_of_run"] != "off"
    return same_t and (not is_scaled or (facts["log_scale"] != "off" and each.length == facts["scale_len"]))


def _perplexities(facts: dict[str, Any], measured: Sequence[Measured]) -> list[str]:
    if not measured:
        return ["The run has no evaluation. `python -m clex_train.cli.evaluate` measures this directory."]
    rows = [
        f"| {each.length:,} | {each.protocol} | {each.t:g} | {each.perplexity:.4g} | "
        f"{'yes' if _holds(each, facts) else 'no'} |"
        for each in sorted(measured, key=lambda each: (each.protocol, each.length))
    ]
    return [
        "From the evaluations of the run, where t and log-scaling follow the length. The last column says if this",
        "export computes the same there.",
        "",
        "| tokens | protocol | t | perplexity | same here |",
        "|---|---|---|---|---|",
        *rows,
    ]
