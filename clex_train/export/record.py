"""What an export says about itself: `clex_export.json` and the model card.

t, L, length served, digest of the field, source, log-scaling, versions; and the perplexity of the run by length.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clex_train.config.scaling import LogScale
from clex_train.export.factors import FixedRope, Source
from clex_train.export.model_card import Measured, export_card
from clex_train.utils import versions

RECORD, CARD = "clex_export.json", "README.md"
FORMAT = 1


def facts(
    source: Source, directory: Path, rope: FixedRope, policy: LogScale, scale: float, length: int
) -> dict[str, Any]:
    """Return the content of `clex_export.json`.

    Args:
        source: records of `directory`.
        directory: model directory with the weights.
        rope: what is exported.
        policy: log-scaling that the export has as a constant, or `off`.
        scale: that constant, the factor of the logits.
        length: tokens of a context whose log-scaling it is.
    """
    table = source.table
    return {
        "format": FORMAT,
        "t": rope.t,
        "context_len": rope.context_len,
        "served_len": rope.served_len,
        "t_factor": source.t_factor,
        "model_type": source.arch.model_type,
        "method": "the model's own RoPE" if table is None else table.method,
        "digest": "" if table is None else table.digest,
        "source": str(directory),
        "log_scale": policy.value,
        "log_scale_of_run": source.log_scale.value,
        "scale": scale,
        "scale_len": length,
        "attention_factor": rope.attention_factor,
        "versions": {versions.OWN: versions.own()}
        | {name: versions.installed_version(name) for name in ("torch", "transformers", "safetensors")},
    }


def write(folder: Path, content: dict[str, Any], rope: FixedRope, measured: Sequence[Measured], runs_in: str) -> None:
    """Write both files into the folder of an export, which the caller publishes; `runs_in` names what reads it."""
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(export_card(content, rope, measured, runs_in), encoding="utf-8")
