"""Load a causal LM of transformers and put CLEX into its rotary module, or say in one line why that cannot be."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.attention.select import resolve_attention, supports_sdpa
from clex_train.config.attention import AttentionImplementation
from clex_train.config.method import FORMULAS, Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale, Positions
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models import architecture, hub, official, weights
from clex_train.models import directory as model_directory
from clex_train.models.initial_field import starting_field
from clex_train.rope import probe, recipes
from clex_train.rope.native import install_native
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling import methods
from clex_train.scaling.clex import Clex
from clex_train.scaling.spectrum import Spectrum
from clex_train.scaling.table import FrequencyTable, scale_grid
from clex_train.utils import distributed, log, seeding
from clex_train.utils.bounds import require
from clex_train.utils.errors import ConfigError, first_line, is_out_of_memory
from clex_train.utils.protocols import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

logger = log.get(__name__)


@dataclass
class LoadedModel:
    """A model under a handle, which has replaced its rotary module if there is one, and what belongs to it."""

    model: PreTrainedModel
    handle: RotaryHandle
    context_len: int
    """L: tokens that the base was trained on."""
    tokenizer: Tokenizer | None = None
    clex: Clex | None = None
    table: FrequencyTable | None = None
    """theta(t) as trained; None for plain RoPE."""
    log_scale: LogScale = LogScale.off
    t_factor: float = 1.0
    """Of the table that `solve_table` makes."""
    engine: Any = None
    """What keeps sharded weights together for as long as the model is used; None for whole ones."""
    formula: Spectrum | None = None
    """What a recipe by formula trains with: the model's own frequencies, and its scale factor as t."""

    @property
    def base_inv_freq(self) -> torch.Tensor:
        """The model's own inverse frequencies, float64 [P]."""
        return self.handle.base_inv_freq


def training_tokenizer(model: ModelConfig, arch: PretrainedConfig, store_tokenizer: Path) -> Tokenizer:
    """The tokenizer of a run: `model.tokenizer`, else that of pretrained weights, else the store's.

    A model that is trained from scratch takes its vocabulary: `arch` is changed to it.
    """
    own = model.path if model.is_pretrained else None
    path = model.tokenizer or own or str(store_tokenizer)
    tokenizer = load_tokenizer(path, model)
    if not model.is_pretrained:
        arch.vocab_size = len(tokenizer)
        arch.bos_token_id, arch.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        arch.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def matmul_shape(model: PreTrainedModel) -> tuple[float, int, int, int]:
    """(weights in matrix products of a token, layers, heads, head dim), for the MFU; whole or sharded models.

    The input embedding is a look-up and does not count unless the output shares it; of experts, those a token visits.
    """
    shape: Any = model.config.get_text_config()
    visited = getattr(shape, "num_experts_per_tok", 1) / max(1, getattr(shape, "num_local_experts", None) or 1)
    visits = 0.0
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        visits += size * (visited if ".experts." in name else 1.0)
    if not getattr(shape, "tie_word_embeddings", False):
        embedding: Any = model.get_input_embeddings().weight
        visits -= getattr(embedding, "ds_numel", embedding.numel())
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return visits, shape.num_hidden_layers, shape.num_attention_heads, head_dim


def num_parameters(module: nn.Module) -> int:
    """Parameters of a model or a part of it, whole or sharded."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def count_parameters(arch: PretrainedConfig, trust_remote_code: bool = False) -> int:
    """Count the parameters of an architecture without its weights, whatever its positions are."""
    return num_parameters(probe.model_on_meta(arch, trust_remote_code))


def check_attention(implementation: AttentionImplementation, key: str = "attention.implementation") -> None:
    """Refuse a back end that this machine does not have; `key` is what the user sets it by."""
    require(
        implementation is not AttentionImplementation.flash_attention_2 or is_flash_attn_2_available(),
        key,
        implementation.name,
        "flash-attn is not installed or there is no GPU: pip install -r requirements-gpu.txt, or use sdpa",
    )


def trained_architecture(config: Config, arch: PretrainedConfig) -> PretrainedConfig:
    """The architecture that a run trains: `arch`, changed where `scaling` is by a formula.

    `ValueError` in one line when it is scaled already, or cannot be scaled so.
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
    """Build the model of a run: weights straight into ZeRO-3 shards if they are pretrained, seeded if random.

    Args:
        config: of the run.
        arch: the architecture of the base.
        dtype: of the weights.
        deepspeed_dict: DeepSpeed's own configuration.
        trained: what `trained_architecture` made of `arch`, where the caller has it.
    """
    length = architecture.context_length(config.model, arch)
    trained = trained_architecture(config, arch) if trained is None else trained
    config = dataclasses.replace(config, attention=resolve_attention(config.attention, trained, dtype))
    if config.model.is_pretrained:
        model = _pretrained_model(config, None if trained is arch else trained, dtype, deepspeed_dict)
    else:
        model = _random_model(config, trained, dtype)
    if config.engine.activation_checkpointing:
        recompute_layers(model)
    model.config.use_cache = False
    # One that follows the length by itself trains at the frequencies of its rows' length.
    install = install_native if methods.for_training(config.scaling).follows_length else install_rotary
    loaded = LoadedModel(model, install(model, length), length)
    policy = config.scaling.log_scale
    if config.scaling.name is Method.clex:
        loaded.clex, policy = starting_field(config, loaded.base_inv_freq)
        loaded.t_factor = config.scaling.t_factor
    if config.scaling.name in FORMULAS:
        loaded.formula = _formula(config, loaded)
    _scale_logits(loaded, policy)
    if config.attention.lambda_mask:
        apply_lm_infinite(model, config.attention.n_local or length, config.attention.n_global)
    return loaded


def _formula(config: Config, loaded: LoadedModel) -> Spectrum:
    """What a recipe by formula trains with; said in the log."""
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
            "scaling=%s: layers %s see at most L tokens and share the RoPE of the others, so they are scaled too, as "
            "transformers reads the model's config; scaling=clex leaves them as they are",
            scaling.name.name,
            ", ".join(map(str, local)),
        )
    served = row_len / length if scaling.positions is Positions.plain else factor
    return dataclasses.replace(recipes.spectrum_at(loaded.handle, served), t=factor)


def load_for_evaluation(
    spec: ModelConfig,
    dtype: torch.dtype | str = torch.float32,
    attention: AttentionImplementation = AttentionImplementation.sdpa,
    sharding: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a model directory or hub repository in one call, with its CLEX table if it has one.

    Directories of the original CLEX code are read as such. `dtype="auto"` keeps that of the stored weights. With
    `sharding`, DeepSpeed's settings of ZeRO-3, each rank keeps its share of the weights while they are read. A model
    without RoPE, or with one that follows the length by itself, stands as it is; one without sdpa has eager attention
    in its place. `ValueError` in one line when there is no such model, it cannot be read through a KV cache, or its
    files cannot be read or hold numbers that are not finite. Collective.
    """
    arch = architecture.to_read(spec)
    weights.check(spec, arch)
    length = architecture.context_length(spec, arch)
    wanted: AttentionImplementation | None = attention
    if attention in (AttentionImplementation.auto, AttentionImplementation.sdpa):
        # Unnamed, it is what transformers takes where code that comes with the model has it.
        wanted = None if supports_sdpa(arch) else AttentionImplementation.eager
    if spec.allow_missing:
        # What is drawn is the same on every rank.
        torch.manual_seed(seeding.torch_seed(0, "weights"))
    model = _load_weights(spec, dtype, wanted, sharding=sharding).eval()
    weights.require_finite(model, str(spec.path))
    tokenizer = load_tokenizer(spec.tokenizer or str(spec.path), spec)
    loaded = LoadedModel(model, install_native(model, length), length, tokenizer)
    directory = Path(str(spec.path))
    if model_directory.has_clex(directory):
        loaded.clex, loaded.table, record = model_directory.read_clex(directory)
        _scale_logits(loaded, LogScale(record.log_scale))
        loaded.t_factor = loaded.table.t_factor
        loaded.handle.use(loaded.table)
    elif official.is_official(directory):
        field = official.read_official_field(directory, loaded.base_inv_freq)
        loaded.clex = field.clex
        _scale_logits(loaded, LogScale(field.log_scale))
        solve_table(loaded)
    return loaded


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the input of each decoder layer for the backward pass (the method has a new name since 5.23)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def solve_table(loaded: LoadedModel) -> FrequencyTable | None:
    """theta(t) of the current ODE weights on the integers up to t_max; put on the model and returned."""
    if loaded.clex is None:
        return None
    table = loaded.clex.table(scale_grid(loaded.clex.t_max))
    loaded.table = dataclasses.replace(table, context_len=loaded.context_len, t_factor=loaded.t_factor)
    loaded.handle.use(loaded.table)
    return loaded.table


@contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Keep transformers' bars of reading and writing weights out of files, and to one rank."""
    is_wanted = sys.stderr.isatty() and distributed.is_main()
    if is_wanted or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def load_tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a directory or hub repository; `ValueError` in one line when there is none.

    That of the model's own repository is of the same revision as its weights.
    """
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, **hub.options(path)}
    if path == model.path and not Path(path).is_dir():
        options["revision"] = model.revision
    if official.is_official(Path(path)):
        # transformers would read the architecture by itself and warn of the rope type it does not know.
        options["config"] = official.read_official_config(Path(path))
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # whatever a library raises over a tokenizer's files is about them
        raise ConfigError(path, None, _no_tokenizer(path, error)) from error
    return tokenizer


def _no_tokenizer(path: str, error: Exception) -> str:
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return (
            f"no tokenizer in it ({' or '.join(TOKENIZER_FILES)}); copy the tokenizer's files beside the weights, or "
            "name their directory, model.tokenizer=DIR in training"
        )
    return f"no readable tokenizer ({hub.why_not_read(path, error)}); copy its files again"


def _scale_logits(loaded: LoadedModel, policy: LogScale) -> None:
    loaded.log_scale = policy
    if policy is not LogScale.off:
        install_log_scaling(loaded.model, policy.value, loaded.context_len, loaded.handle.on_length)


def _random_model(config: Config, arch: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights on every rank, so that sharding them later needs no broadcast and no rank count matters."""
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
    # Of the same numbers on every rank, should `model.allow_missing` let some be drawn.
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
    """Load the weights of `spec`, under the architecture `changed` if it is not that of their directory.

    With `sharding`, DeepSpeed's settings, this rank keeps its share of them while they are read; collective.
    `ValueError` names tensors that weights and architecture do not share.
    """
    if sharding is None:
        model, report = _from_pretrained(spec, dtype, attention, changed)
    else:
        model, report = _shards(sharding, spec, dtype, attention, changed)
    # Of a hub name the files are compared by a model on the meta device, which must not be sharded.
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
    """Load the weights, of which this rank keeps its share while they are read. Collective."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards every model that is built for as long as this object lives.
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
    """Load the weights, with transformers' report on them, which names the tensors that do not fit."""
    path, directory = str(spec.path), Path(str(spec.path))
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention and attention.value}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **hub.options(path)}
    if changed is not None:
        options["config"] = changed
    try:
        with bars_on_a_terminal(), weights.without_report():
            if official.is_official(directory):
                return official.load_official_model(directory, **options)
            options |= {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
            model, report = AutoModelForCausalLM.from_pretrained(path, **options)
            return model, report
    except Exception as error:  # whatever the loader raises over files that do not belong together
        # Reading shares is collective: a rank that is lost is not a fault of the files.
        if is_out_of_memory(error) or (is_sharded and isinstance(error, RuntimeError)):
            raise
        # Only of files that are not there can a hub out of reach be the reason.
        reason = hub.why_not_read(path, error) if isinstance(error, OSError) else first_line(error)
        raise ConfigError("model.path", path, f"the weights cannot be loaded ({reason})") from error
