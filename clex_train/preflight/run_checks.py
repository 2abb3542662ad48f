"""Check everything about a run that can be known before its weights are read: the one list of checks.

Training, the dry run, the submission to SLURM and the out-of-memory message call `run_checks` and use its result. A
check that is added here applies to all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from clex_train.adapters import checks as adapters
from clex_train.adapters import lora, trained_set
from clex_train.adapters.trained_set import TrainedSet
from clex_train.attention.select import check_attention
from clex_train.checkpoint.listing import Found
from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.store import Checkpoints
from clex_train.config import root as configuration
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config, Resume
from clex_train.data import build as data
from clex_train.data import conversations
from clex_train.data.build import PackedRows
from clex_train.data.overlap import require_disjoint
from clex_train.data.rows import Rows
from clex_train.engine import deepspeed as engines
from clex_train.engine import liger
from clex_train.measures import during_training
from clex_train.measures.during_training import TrainingEvaluation
from clex_train.model_config.context_length import ContextLength
from clex_train.model_config.meta_models import model_on_meta, sharing_meta_models
from clex_train.models import architecture, directory, load, memory_options, weights
from clex_train.models.tokenizer import training_tokenizer
from clex_train.preflight import document_mask, final_model, kernels, positions, sequence_parallel
from clex_train.rope.native import native_handle_on_meta
from clex_train.rope.probe import require_rotary
from clex_train.token_store import vocabulary
from clex_train.token_store.store import TokenStore
from clex_train.tracking import back_ends, run_folder
from clex_train.utils import distributed, log
from clex_train.utils.errors import ConfigError, InputError

logger = log.get(__name__)


class Scope(Enum):
    """Availability of a run's machines, files and ranks where the checks run."""

    run = "run"
    """This process trains: its packages, its login to a tracker and its number of ranks count."""
    submission = "submission"
    """Machines that share this file system train: stores and weights must be here, packages are theirs."""
    plan = "plan"
    """Any machine trains: stores and weights that are not here are not checked."""


@dataclass(frozen=True)
class Inputs:
    """Stores, tokenizer and rows of a run."""

    stores: Mapping[str, TokenStore]
    """The training split of each store by domain, "" without domains; in a plan, of those that are here."""
    is_complete: bool
    """True if all of them are here; False only in a plan."""
    held_out: TokenStore | None
    """The documents that evaluations read; None where there are none, or not here."""
    tokenizer: Any
    """None in a plan without the tokenizer or the store."""
    packed: Mapping[str, PackedRows] = field(default_factory=dict)
    """One pass over each store; empty unless complete."""
    rows: Rows | None = None
    """The endless order of the run; None unless complete."""


@dataclass(frozen=True)
class History:
    """Earlier launches, as recorded in the run folder."""

    checkpoints: Checkpoints
    newest: Found | None
    """The checkpoint that the run would resume."""
    recorded: Path | None
    """Its verified copy of the configuration."""

    @property
    def first_step(self) -> int:
        """Optimizer steps taken before this launch."""
        return self.newest.manifest.step if self.newest else 0


@dataclass(frozen=True)
class Preflight:
    """Result of the checks."""

    requested: Config
    """Configuration with the lengths that follow from model and data; recorded in the run folder."""
    config: Config
    """The same with the attention back end that `auto` resolves to on this machine."""
    world_size: int
    model: ModelConfig
    """Source of the architecture; in a plan, a preset may substitute for a model that is not here."""
    arch: PretrainedConfig
    """Architecture of the base, before scaling by a formula."""
    trained: PretrainedConfig
    on_meta: PreTrainedModel
    """The model of `arch` on the meta device."""
    context: ContextLength
    settings: dict[str, Any]
    """DeepSpeed's own configuration."""
    inputs: Inputs
    evaluation: TrainingEvaluation | None
    """None without evaluations, and in a plan without the documents or the tokenizer."""
    history: History | None
    """None in a plan without the stores, which identify a checkpoint's data."""
    adapters: TrainedSet | None = None
    """Adapters of the run; None if it trains every weight."""


def run_checks(config: Config, scope: Scope = Scope.run) -> Preflight:
    """Check a configuration against its model, its data, its run folder and this machine; no weights are read.

    Raises:
        ConfigError: naming the key, the value and the remedy; `InputError` for damaged files.
    """
    with sharing_meta_models():
        configuration.check_protocols(config)
        configuration.check_lambda_mask(config)
        world_size = _world_size(config, scope)
        settings = engines.deepspeed_dict(config, world_size)
        _check_machine(config, scope)
        model, arch = _read_architecture(config, scope)
        adapters.check_base(config, arch)
        inputs = _open_inputs(config, arch, scope)
        _check_weights(model, arch, scope)
        context = architecture.context_source(model, arch)
        # Unscaled training keeps a RoPE that follows the length.
        fixed = context.length if config.scaling.name is Method.clex else None
        require_rotary(arch, config.model.trust_remote_code, fixed)
        requested = configuration.with_lengths(config, context.length, data.longest_document(inputs.held_out))
        config = kernels.resolve_attention(requested, arch)
        inputs = _pack(config, inputs)
        trained = _check_model(config, arch, context.length)
        adapted = adapters.check(config, arch)
        evaluation = _plan_evaluation(config, inputs, trained, context.length)
        history = _read_history(requested, arch, trained, inputs, world_size) if inputs.is_complete else None
        on_meta = model_on_meta(arch, config.model.trust_remote_code)
        positions.warn_of_stretched_rows(config, context.length)
        positions.warn_of_short_rows(config, context.length)
        final_model.warn_if_unreadable(config, arch, context.length)
    return Preflight(
        requested,
        config,
        world_size,
        model,
        arch,
        trained,
        on_meta,
        context,
        settings,
        inputs,
        evaluation,
        history,
        adapted,
    )


def _world_size(config: Config, scope: Scope) -> int:
    if scope is Scope.submission:
        return config.launch.nodes * config.launch.ranks
    planned = config.engine.world_size if scope is Scope.plan else None
    return planned or distributed.world_size()


def _check_machine(config: Config, scope: Scope) -> None:
    """Raise `ConfigError` for missing packages or a missing login where the run trains; elsewhere, log a warning."""
    try:
        check_attention(config.attention.implementation)
        liger.check(config.engine.liger)
        lora.require_peft(config.adapter)
        back_ends.require_ready(config.tracking)
    except ConfigError as error:
        if scope is Scope.run:
            raise
        logger.warning("a run on this machine would be refused: %s", error)


def _read_architecture(config: Config, scope: Scope) -> tuple[ModelConfig, PretrainedConfig]:
    model = config.model
    if scope is Scope.submission and model.path:
        architecture.require_directory("model.path", model.path)
    if scope is not Scope.run:
        model = architecture.stand_in(model)
    arch = architecture.to_read(model)
    architecture.warn_of_unused_config(model)
    return model, arch


def _check_weights(model: ModelConfig, arch: PretrainedConfig, scope: Scope) -> None:
    if scope is not Scope.plan or (model.path and directory.has_weights(model.path)):
        weights.check(model, arch)


def _open_inputs(config: Config, arch: PretrainedConfig, scope: Scope) -> Inputs:
    """Open stores and tokenizer; random weights take the tokenizer's vocabulary, so `arch` is changed to it."""
    paths = [domain.path for domain in config.data.domains.values()] or [config.data.path]
    is_complete = scope is not Scope.plan or all(path is not None and Path(path).exists() for path in paths)
    stores = data.open_stores(config.data) if is_complete else data.open_existing_stores(config.data)
    held_out = _open_held_out(config, stores, scope)
    if config.model.is_pretrained:
        _check_ids(config, arch, stores, held_out)
    if not is_complete or (scope is Scope.plan and not _has_tokenizer(config.model)):
        return Inputs(stores, is_complete, held_out, None)
    store = next(iter(stores.values()))
    tokenizer = training_tokenizer(config.model, arch, store.tokenizer_path)
    vocabulary.check_tokenizer(store, tokenizer)
    conversations.use_template(tokenizer, stores)
    if not config.model.is_pretrained:
        _check_ids(config, arch, stores, None)
    return Inputs(stores, is_complete, held_out, tokenizer)


def _open_held_out(config: Config, stores: Mapping[str, TokenStore], scope: Scope) -> TokenStore | None:
    path = config.evaluation.path
    is_here = Path(path).exists() if path else "" in stores
    if not is_here and scope is Scope.plan:
        return None
    try:
        return during_training.held_out(config, stores.get(""))
    except InputError:
        # A run without evaluations needs no documents to evaluate on.
        if config.evaluation.every >= 0:
            raise
        return None


def _check_ids(
    config: Config, arch: PretrainedConfig, stores: Mapping[str, TokenStore], held_out: TokenStore | None
) -> None:
    """Check that the embedding has a row for every id of the documents."""
    num_rows, name = architecture.embedding_rows(arch), architecture.name(config.model)
    for store in stores.values():
        vocabulary.check_embedding(store, num_rows, name)
    if held_out is not None and config.evaluation.every >= 0:
        during_training.check_ids(config, held_out, num_rows)


def _has_tokenizer(model: ModelConfig) -> bool:
    """Return True if the tokenizer of a run is on this machine, given that its store is."""
    named = model.tokenizer or (model.path if model.is_pretrained else None)
    return named is None or Path(named).exists()


def _pack(config: Config, inputs: Inputs) -> Inputs:
    if not inputs.is_complete:
        return inputs
    packed = data.pack(inputs.stores, config.data)
    rows = data.build_rows(packed, config.data, config.seed, config.optim.batch_rows)
    return replace(inputs, packed=packed, rows=rows)


def _check_model(config: Config, arch: PretrainedConfig, context_len: int) -> PretrainedConfig:
    """Check that the model supports the configuration, and return the architecture that is trained."""
    document_mask.check_document_mask(config, arch, context_len)
    memory_options.check(config.engine, arch, config.model.trust_remote_code)
    sequence_parallel.check_sequence_parallel(config, arch)
    configuration.check_reach(config, context_len)
    configuration.check_scaling(config, architecture.has_field(str(config.model.path)))
    configuration.check_positions(config, context_len)
    return load.trained_architecture(config, arch)


def _plan_evaluation(
    config: Config, inputs: Inputs, trained: PretrainedConfig, context_len: int
) -> TrainingEvaluation | None:
    """Check the evaluations of a run, and choose their windows and prompts if documents and tokenizer are here."""
    store = next(iter(inputs.stores.values()), None)
    if config.evaluation.every < 0:
        if inputs.is_complete and store is not None and distributed.is_main():
            during_training.warn_of_later(config, store)
        return None
    if inputs.held_out is None or store is None or (inputs.tokenizer is None and config.evaluation.has_prompts()):
        _check_methods(config, trained, context_len)
        return None
    # Before the methods, which would otherwise refuse tables for lengths that no document has.
    evaluation = TrainingEvaluation(config, store, inputs.held_out, context_len, inputs.tokenizer)
    _check_methods(config, trained, context_len)
    require_disjoint(inputs.stores.values(), evaluation.store, config.evaluation.allow_overlap)
    return evaluation


def _check_methods(config: Config, trained: PretrainedConfig, context_len: int) -> None:
    handle = native_handle_on_meta(trained, context_len, config.model.trust_remote_code)
    try:
        during_training.check_methods(config, handle)
    finally:
        # The model is shared with the other checks.
        handle.undo()


def _read_history(
    config: Config, arch: PretrainedConfig, trained: PretrainedConfig, inputs: Inputs, world_size: int
) -> History:
    """Compare the run with an earlier launch in its folder, if any."""
    # `dry_run` does not change the run.
    config = replace(config, dry_run=False)
    run_dir = Path(config.output_dir)
    trained_as = trained_set.identity(architecture.digest(trained), config.adapter)
    identity = Manifest.from_config(config, trained_as, data.fingerprint(inputs.stores))
    is_strict = config.resume is Resume.strict
    checkpoints = Checkpoints(run_dir, config.checkpoint, identity, is_strict, run_folder.as_yaml(config))
    newest = checkpoints.newest()
    recorded = newest.config() if newest else None
    other_ranks = newest is not None and newest.manifest.world_size != world_size
    own_context = architecture.own_context(config.model, arch)
    run_folder.check_config(config, newest is not None, other_ranks, own_context, recorded)
    return History(checkpoints, newest, recorded)
