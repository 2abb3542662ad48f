"""Loading of causal LMs from transformers, for training or evaluation, with CLEX in their rotary module."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clex_train.attention.log_scaling import LogScaling, install_log_scaling
from clex_train.attention.select import resolve_attention, supports_sdpa
from clex_train.attention.token_scaling import TokenScaling
from clex_train.config.attention import AttentionImplementation
from clex_train.config.method import FORMULAS, Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale, Positions
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models import architecture, hub, memory_options, official, weights
from clex_train.models import directory as model_directory
from clex_train.models.initial_field import starting_field
from clex_train.models.tokenizer import load_tokenizer
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import install_native
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.spectrum import Spectrum
from clex_train.scaling.static_rope import StaticRope
from clex_train.utils import distributed, log, seeding
from clex_train.utils.errors import ConfigError, first_line, is_out_of_memory
from clex_train.utils.protocols import Tokenizer

logger = log.get(__name__)


@dataclass
class LoadedModel:
    """A model, the handle of its replaced rotary module, and what was loaded with it."""

    model: PreTrainedModel
    handle: RotaryHandle
    context_len: int
    """L in tokens: the context that the base model was trained on."""
    tokenizer: Tokenizer | None = None
    clex: Clex | None = None
    table: FrequencyTable | None = None
    """Frequency table theta(t) as trained; None for plain RoPE."""
    log_scale: LogScale = LogScale.off
    log_scaling: LogScaling | TokenScaling | None = None
    """Scaling of the logits that is installed; None with `off`."""
    t_factor: float = 1.0
    """At inference, a context uses the t of one `t_factor` times as long; written into the table."""
    engine: Any = None
    """DeepSpeed engine that gathers sharded weights, kept alive with the model; None for whole weights."""
    lambda_mask: bool = False
    """True if LM-Infinite's mask is part of the model in training."""
    formula: Spectrum | None = None
    """Frequencies of a formula-based method, with its scale factor as t; None for CLEX and plain RoPE."""
    static: StaticRope | None = None
    """Factors on them that the run learns; None for every method but `static`."""

    @property
    def base_inv_freq(self) -> torch.Tensor:
        """Inverse frequencies of the unmodified model, float64 [P]."""
        return self.handle.base_inv_freq

    @property
    def learned(self) -> Clex | StaticRope | None:
        """Frequencies that are trained with the model; None if they are fixed."""
        return self.clex or self.static

    def scale_logits(self, policy: LogScale) -> None:
        """Scale the attention logits by a policy, in place of the one before."""
        if self.log_scaling is not None:
            # Two scalings would multiply.
            self.log_scaling.undo()
        self.log_scale, self.log_scaling = policy, None
        if policy is not LogScale.off:
            listen = (self.handle.on_length, self.handle.on_call)
            self.log_scaling = install_log_scaling(self.model, policy.value, self.context_len, *listen)

    @contextmanager
    def log_scaled(self, policy: LogScale | None) -> Iterator[None]:
        """Scale the logits by another policy than the model's own in the block; None keeps its own."""
        own = self.log_scale
        self.scale_logits(own if policy is None else policy)
        try:
            yield
        finally:
            self.scale_logits(own)

    def solve_table(self) -> FrequencyTable | None:
        """Compute and use theta(t) of the current weights at the integers up to t_max; None if nothing is learned."""
        if self.learned is None:
            return None
        table = self.learned.table(scale_grid(self.learned.t_max))
        self.table = dataclasses.replace(table, context_len=self.context_len, t_factor=self.t_factor)
        self.handle.use(self.table)
        return self.table


def trained_architecture(config: Config, arch: PretrainedConfig) -> PretrainedConfig:
    """Return the architecture that a run trains: `arch`, with the RoPE parameters of a formula-based method.

    Raises `ConfigError` when it is scaled already, or cannot be scaled this way.
    """
    scaling, length = config.scaling, architecture.context_length(config.model, arch)
    if scaling.name is Method.clex:
        recipes.require_unscaled(arch, scaling.name)
        require_scalable_config(arch, length, config.model.trust_remote_code)
    if scaling.name not in FORMULAS:
        return arch
    factor = scaling.factor_for(config.data.seq_len, length)
    return recipes.scaled(arch, scaling, factor, length, config.model.trust_remote_code)


def load_for_training(
    config: Config,
    arch: PretrainedConfig,
    dtype: torch.dtype,
    deepspeed_dict: dict[str, Any],
    trained: PretrainedConfig | None = None,
) -> LoadedModel:
    """Build the model of a run. Pretrained weights are sharded while they are read, random ones are seeded.

    Args:
        config: Configuration of the run.
        arch: Architecture of the base model, before `trained_architecture`.
        dtype: Data type of the weights.
        deepspeed_dict: DeepSpeed's own configuration.
        trained: Result of `trained_architecture`, computed here when it is None.
    """
    length = architecture.context_length(config.model, arch)
    trained = trained_architecture(config, arch) if trained is None else trained
    config = dataclasses.replace(config, attention=resolve_attention(config.attention, trained, dtype))
    if config.model.is_pretrained:
        model = _pretrained_model(config, None if trained is arch else trained, dtype, deepspeed_dict)
    else:
        model = _random_model(config, trained, dtype)
    if config.engine.activation_checkpointing:
        memory_options.recompute_layers(model)
    # A KV cache is useless in training, and transformers warns about it under gradient checkpointing.
    model.config.use_cache = False
    # Without a field, a RoPE that adapts to the length by itself (dynamic NTK, LongRoPE) keeps doing so.
    install = install_rotary if config.scaling.name is Method.clex else install_native
    loaded = LoadedModel(model, install(model, length), length)
    policy = config.scaling.log_scale
    if config.scaling.name is Method.clex:
        loaded.clex, policy = starting_field(config, base_rope(loaded.handle))
        loaded.t_factor = config.scaling.t_factor
    if config.scaling.name in FORMULAS:
        loaded.formula = formula = _formula(config, loaded)
        if config.scaling.name is Method.static:
            loaded.static = recipes.learned_module(config.scaling, loaded.handle, formula)
    loaded.scale_logits(policy)
    if config.attention.lambda_mask:
        apply_lm_infinite(model, config.attention.n_local or length, config.attention.n_global)
        loaded.lambda_mask = True
    return loaded


def _formula(config: Config, loaded: LoadedModel) -> Spectrum:
    """Return the frequencies of a formula-based method, and log its factor."""
    scaling, row_len, length = config.scaling, config.data.seq_len, loaded.context_len
    factor = scaling.factor_for(row_len, length)
    logger.info("scaling=%s: factor %g, L = %d, rows of %d tokens", scaling.name.name, factor, length, row_len)
    if scaling.positions is Positions.plain and row_len <= length and factor > 1:
        logger.warning(
            "scaling.positions=plain: rows of %d tokens show the model no position beyond L = %d; "
            "skip spreads them over factor * L",
            row_len,
            length,
        )
    local = sorted(loaded.handle.rotary.local_layers)
    if local and factor > 1:
        logger.warning(
            "scaling=%s: layers %s attend to at most L tokens but share the RoPE of the others, so they are scaled "
            "too, because transformers reads the model's config that way; scaling=clex leaves them unchanged",
            scaling.name.name,
            ", ".join(map(str, local)),
        )
    # Plain positions never leave the row, so the table is read at the row's own factor.
    served = row_len / length if scaling.positions is Positions.plain else factor
    return dataclasses.replace(recipes.spectrum_at(loaded.handle, served), t=factor)


def load_for_evaluation(
    spec: ModelConfig,
    dtype: torch.dtype | str = torch.float32,
    attention: AttentionImplementation = AttentionImplementation.sdpa,
    sharding: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a model directory or hub repository for evaluation, with its CLEX table if it has one. Collective.

    Also reads directories of the original CLEX code. A model without RoPE, or whose RoPE adapts to the length by
    itself, is left unchanged.

    Args:
        spec: path, revision and allowances.
        dtype: of the weights; "auto" keeps that of the files.
        attention: `sdpa` becomes `eager` for a model without it.
        sharding: DeepSpeed's ZeRO-3 settings; each rank then keeps only its shard while weights are read.

    Raises `InputError` when the model is missing, cannot use a KV cache, is unreadable, or has weights that are not
    finite.
    """
    arch = architecture.to_read(spec)
    weights.check(spec, arch)
    length = architecture.context_length(spec, arch)
    wanted: AttentionImplementation | None = attention
    if attention in (AttentionImplementation.auto, AttentionImplementation.sdpa):
        # None leaves the choice to transformers, which takes sdpa where the model's own code supports it.
        wanted = None if supports_sdpa(arch) else AttentionImplementation.eager
    if spec.allow_missing:
        # Missing tensors are drawn at random, and must be the same on every rank.
        torch.manual_seed(seeding.torch_seed(0, "weights"))
    model = _load_weights(spec, dtype, wanted, sharding=sharding).eval()
    weights.require_finite(model, str(spec.path))
    tokenizer = load_tokenizer(spec.tokenizer or str(spec.path), spec)
    loaded = LoadedModel(model, install_native(model, length), length, tokenizer)
    directory = Path(str(spec.path))
    if model_directory.has_clex(directory):
        loaded.clex, loaded.table, record = model_directory.read_clex(directory)
        loaded.scale_logits(LogScale(record.log_scale))
        loaded.t_factor = loaded.table.t_factor
        loaded.handle.use(loaded.table)
    elif official.is_official(directory):
        field = official.read_official_field(directory, loaded.base_inv_freq)
        loaded.clex = field.clex
        loaded.scale_logits(LogScale(field.log_scale))
        loaded.solve_table()
    return loaded


@contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Show transformers' progress bars on a terminal and on one rank only."""
    # In a log file, each update of a bar would be a line.
    is_wanted = sys.stderr.isatty() and distributed.is_main()
    if is_wanted or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _random_model(config: Config, arch: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model with the same random weights on every rank."""
    # Seeded alike, sharding needs no broadcast, and the weights do not depend on the number of ranks.
    torch.manual_seed(seeding.torch_seed(config.seed, "weights"))
    return AutoModelForCausalLM.from_config(
        arch,
        dtype=dtype,
        attn_implementation=config.attention.implementation.value,
        trust_remote_code=config.model.trust_remote_code,
    )


def _pretrained_model(
    config: Config, changed: PretrainedConfig | None, dtype: torch.dtype, deepspeed_dict: dict[str, Any]
) -> PreTrainedModel:
    # With `model.allow_missing`, some tensors are drawn at random, and must be the same on every rank.
    torch.manual_seed(seeding.torch_seed(config.seed, "weights"))
    sharding = deepspeed_dict if config.engine.zero_stage == 3 else None
    return _load_weights(config.model, dtype, config.attention.implementation, changed, sharding)


def _load_weights(
    spec: ModelConfig,
    dtype: torch.dtype | str,
    attention: AttentionImplementation | None,
    changed: PretrainedConfig | None = None,
    sharding: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the weights of `spec`, with the architecture `changed` instead of their directory's if given.

    With `sharding`, this rank keeps only its shard; collective. Raises `InputError`, naming the tensors that weights
    and architecture do not share.
    """
    if sharding is None:
        model, report = _from_pretrained(spec, dtype, attention, changed)
    else:
        model, report = _shards(sharding, spec, dtype, attention, changed)
    # After sharding has ended: for a hub name this builds a model on the meta device, which must not be sharded.
    weights.check_loaded(spec, model.config, report)
    weights.announce(report, spec)
    return model


def _shards(
    sharding: dict[str, Any],
    spec: ModelConfig,
    dtype: torch.dtype | str,
    attention: AttentionImplementation | None,
    changed: PretrainedConfig | None,
) -> tuple[PreTrainedModel, weights.Report]:
    """Load the weights into ZeRO-3 shards. Collective."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps a weak reference to this object, and shards every model that is built while it lives.
    alive = HfDeepSpeedConfig(sharding)
    try:
        return _from_pretrained(spec, dtype, attention, changed, is_sharded=True)
    finally:
        del alive


def _from_pretrained(
    spec: ModelConfig,
    dtype: torch.dtype | str,
    attention: AttentionImplementation | None,
    changed: PretrainedConfig | None,
    is_sharded: bool = False,
) -> tuple[PreTrainedModel, weights.Report]:
    """Load the weights; also return transformers' report of tensors that do not fit."""
    path, directory = str(spec.path), Path(str(spec.path))
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention and attention.value}
    # Collect mismatched shapes in the report instead of raising for the first, so that one message names them all.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **hub.options(path)}
    if changed is None and model_directory.has_clex(directory):
        # Its config.json may state the RoPE of one t; the field starts from that of the base.
        changed = architecture.to_read(spec)
    if changed is not None:
        options["config"] = changed
    try:
        with bars_on_a_terminal(), weights.without_report():
            if official.is_official(directory):
                return official.load_official_model(directory, **options)
            options |= {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
            model, report = AutoModelForCausalLM.from_pretrained(path, **options)
            return model, report
    except Exception as error:  # the loader raises many types for inconsistent files
        # Sharded reading is collective, so a RuntimeError may come from a lost rank instead of the files.
        if is_out_of_memory(error) or (is_sharded and isinstance(error, RuntimeError)):
            raise
        # An unreachable hub can only explain missing files.
        reason = hub.why_not_read(path, error) if isinstance(error, OSError) else first_line(error)
        raise ConfigError("model.path", path, f"the weights cannot be loaded ({reason})") from error
