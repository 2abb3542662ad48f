"""Export as a Hugging Face directory at one t, which plain transformers and vLLM load without code of ours.

config.json          `longrope` with the factors of t (`stock_rope`); everything else is the base's
weights              as they are, linked or copied; rewritten where log-scaling is folded into the queries
tokenizer, licence   as they are
clex_export.json     t, L, length served, digest of the field, source, log-scaling, versions
README.md            model card, with the perplexity of the run where it was evaluated
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.config.scaling import LogScale
from clex_train.export import constant_scale, record, serving, weight_copies
from clex_train.export.constant_scale import Change
from clex_train.export.factors import FixedRope, Source, rope_at
from clex_train.export.model_card import Measured
from clex_train.export.stock_rope import stock_config
from clex_train.models import official
from clex_train.utils import log
from clex_train.utils.files import atomic_directory, make_folder

logger = log.get(__name__)


@dataclass(frozen=True)
class Plan:
    """An export that was checked and has not been written."""

    source: Source
    directory: Path
    """Of the weights."""
    rope: FixedRope
    config: Any
    facts: dict[str, Any]
    """Content of `clex_export.json`."""
    changes: dict[str, Change] = field(default_factory=dict)
    """By the name of a tensor: what folds log-scaling into it."""
    link: bool = True

    @property
    def rewrites(self) -> bool:
        """True if some weight files are not those of the source."""
        return bool(self.changes) or official.is_official(self.directory)


def plan(
    source: Source,
    directory: Path,
    t: float,
    fold: bool,
    link: bool = True,
    trust_remote_code: bool = False,
    length: int | None = None,
) -> Plan:
    """Check everything that can be refused, without reading weights but norms of queries.

    Args:
        source: records of `directory`.
        directory: model directory with the weights.
        t: scale factor.
        fold: fold log-scaling into the queries, where the model was trained with a policy.
        link: link files that do not change, instead of copying them.
        trust_remote_code: run the code of the directory to build its architecture.
        length: tokens whose log-scaling is folded; by default the most for which the product uses `t`.

    Raises:
        ConfigError: nothing stock expresses the model at this t, or log-scaling cannot be folded into its weights.
    """
    rope = rope_at(source, t)
    config = stock_config(source.arch, rope, trust_remote_code)
    policy = source.log_scale if fold else LogScale.off
    length = length or source.longest_at(t)
    layers = constant_scale.layers(source, length, policy)
    folded = _stored_changes(source, directory, layers)
    facts = record.facts(source, directory, rope, policy, max((layer.scale for layer in layers), default=1.0), length)
    return Plan(source, directory, rope, config, facts, folded, link)


def write(planned: Plan, output: Path, measured: Sequence[Measured] = (), overrides: Sequence[FixedRope] = ()) -> None:
    """Write a planned export atomically, with vLLM's override for each of `overrides`.

    Raises:
        ConfigError: the disk has no room; nothing is written.
    """
    weight_copies.require_space(output, _needed(planned))
    make_folder(output.parent)
    with atomic_directory(output) as folder:
        _place_weights(planned, folder)
        for name in weight_copies.companions(planned.directory):
            (folder / name).parent.mkdir(exist_ok=True)
            # Copied in any case: a link would let an edit of the one change the other.
            weight_copies.place(planned.directory / name, folder / name, link=False)
        weight_copies.raise_tokenizer_limit(folder, planned.rope.served_len)
        planned.config.save_pretrained(folder)
        serving.write_overrides(folder, planned.source.arch, overrides)
        record.write(folder, planned.facts, planned.rope, measured, serving.runs_in(planned.rope, planned.source.arch))
    logger.info("wrote %s at t = %g, for contexts of up to %d tokens", output, planned.rope.t, planned.rope.served_len)


def _stored_changes(source: Source, directory: Path, layers: list[constant_scale.Layer]) -> dict[str, Change]:
    """Map the stored names of tensors to what folds log-scaling into them."""
    if not layers:
        return {}
    places = weight_copies.tensor_places(directory)

    def read(name: str) -> Any:
        return weight_copies.read_tensor(places, weight_copies.stored_name(name, places))

    folded = constant_scale.changes(layers, source.arch, read)
    return {weight_copies.stored_name(name, places): change for name, change in folded.items()}


def _place_weights(planned: Plan, folder: Path) -> None:
    if not planned.rewrites:
        weight_copies.place_weights(planned.directory, folder, planned.link)
        return
    # The original code keeps its field among the weights, where no engine knows it.
    weight_copies.rewrite_weights(
        planned.directory, folder, planned.changes, lambda name: official.CLEX_LAYER in name, planned.link
    )


def _needed(planned: Plan) -> int:
    small = [planned.directory / name for name in weight_copies.companions(planned.directory)]
    linked = planned.link and not planned.rewrites
    return weight_copies.size(small + ([] if linked else weight_copies.weight_paths(planned.directory)))
