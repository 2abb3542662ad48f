"""Load a causal LM of transformers, put CLEX into its rotary module, or say in one line why that cannot be.

Everything that can be wrong with `model.*` is found from the architecture alone, before weights are read.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from clex_train import log, model_directory, seeding
from clex_train.attention.log_scaling import install_log_scaling
from clex_train.config import AttentionImplementation, Config, Init, LogScale, ModelConfig, ScalingName, require
from clex_train.rope.patch import RotaryHandle, install_rotary, require_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.table import FrequencyTable, scale_grid

logger = log.get(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class LoadedModel:
    """A model with its rotary module replaced, and what belongs to it."""

    model: PreTrainedModel
    handle: RotaryHandle
    context_len: int
    """L: tokens that the base was trained on."""
    tokenizer: Any = None
    clex: Clex | None = None
    table: FrequencyTable | None = None
    """theta(t) as trained; None for plain RoPE."""
    log_scale: LogScale = LogScale.off

    @property
    def base_inv_freq(self) -> torch.Tensor:
        """The model's own inverse frequencies, float64 [P]."""
        return self.handle.base_inv_freq


def architecture(model: ModelConfig) -> PretrainedConfig:
    """The architecture of `model.path` (or of `model.config` alone).

    `ValueError` in one line if it cannot be read or has no rotary embedding.
    """
    key, path = ("model.path", model.path) if model.path else ("model.config", _shipped(model.config))
    assert path is not None
    require_directory(key, path)
    try:
        config = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path}: no readable config.json ({_first_line(error)})") from error
    require_rotary(config)
    return config


def _shipped(path: str | None) -> str | None:
    """A relative `model.config` is looked up from here, then from this repository, so that runs start anywhere."""
    if path is None or Path(path).exists() or not (REPOSITORY / path).is_dir():
        return path
    return str(REPOSITORY / path)


def training_tokenizer(model: ModelConfig, arch: PretrainedConfig, store_tokenizer: Path) -> Any:
    """The tokenizer of a run: `model.tokenizer`, else that of pretrained weights, else the store's.

    A model that is trained from scratch takes its vocabulary: `arch` is changed to it.
    """
    own = model.path if model.init is Init.pretrained else None
    path = model.tokenizer or own or str(store_tokenizer)
    tokenizer = load_tokenizer(path, model)
    if model.init is Init.random:
        arch.vocab_size = len(tokenizer)
        arch.bos_token_id, arch.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        arch.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def architecture_digest(arch: PretrainedConfig) -> str:
    """A digest of everything in an architecture that shapes its weights or its function, for checkpoints."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    facts = {k: v for k, v in arch.to_dict().items() if k not in ignored}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def require_directory(key: str, path: str) -> None:
    """Refuse what looks like a local path and is none; a name such as `meta-llama/Llama-2-7b-hf` is left to the hub."""
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    require(
        not local or Path(path).is_dir(),
        key,
        path,
        "no such directory; give a model directory or a hub name owner/model",
    )


def context_length(model: ModelConfig, config: PretrainedConfig) -> int:
    """L: `model.context_len`, else what an earlier CLEX run recorded, else the architecture's own."""
    if model.context_len is not None:
        return model.context_len
    if model.path and model_directory.has_clex(Path(model.path)):
        return model_directory.read_record(Path(model.path)).context_len
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    require(
        length is not None, "model.context_len", None, "the architecture does not say what context it was trained on"
    )
    assert length is not None
    return int(length)


def check_attention(implementation: AttentionImplementation) -> None:
    """Refuse a back end that this machine does not have."""
    require(
        implementation is not AttentionImplementation.flash_attention_2 or is_flash_attn_2_available(),
        "attention.implementation",
        implementation.name,
        "flash-attn is not installed or there is no GPU: pip install -r requirements-gpu.txt, or use sdpa",
    )


def load_for_training(
    config: Config, arch: PretrainedConfig, dtype: torch.dtype, deepspeed_dict: dict[str, Any]
) -> LoadedModel:
    """Build the model of a run: weights straight into ZeRO-3 shards if they are pretrained, seeded if random."""
    length = context_length(config.model, arch)
    if config.model.init is Init.random:
        model = _random_model(config, arch, dtype)
    else:
        model = _pretrained_model(config, dtype, deepspeed_dict)
    if config.engine.activation_checkpointing:
        recompute_layers(model)
    model.config.use_cache = False
    loaded = LoadedModel(model, install_rotary(model, length), length)
    _scale_logits(loaded, config.scaling.log_scale)
    if config.scaling.name is ScalingName.clex:
        loaded.clex = _clex_for_training(config, loaded.base_inv_freq)
    return loaded


def load_for_evaluation(spec: ModelConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model directory or hub repository in one call, with its CLEX table if it has one.

    `ValueError` in one line when there is no such model, it has no RoPE, or its files cannot be read.
    """
    length = context_length(spec, architecture(spec))
    model = _from_pretrained(spec, dtype, AttentionImplementation.sdpa).eval()
    tokenizer = load_tokenizer(spec.tokenizer or str(spec.path), spec)
    loaded = LoadedModel(model, install_rotary(model, length), length, tokenizer)
    if model_directory.has_clex(Path(str(spec.path))):
        loaded.clex, loaded.table, record = model_directory.read_clex(Path(str(spec.path)))
        _scale_logits(loaded, LogScale(record.log_scale))
        loaded.handle.use(loaded.table)
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
    loaded.table = dataclasses.replace(table, context_len=loaded.context_len)
    loaded.handle.use(loaded.table)
    return loaded.table


def load_tokenizer(path: str, model: ModelConfig) -> Any:
    """The tokenizer of a directory or hub repository; `ValueError` in one line when there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable tokenizer ({_first_line(error)})") from error


def _scale_logits(loaded: LoadedModel, policy: LogScale) -> None:
    loaded.log_scale = policy
    if policy is not LogScale.off:
        install_log_scaling(loaded.model, policy.value, loaded.context_len, loaded.handle.on_length)


def _random_model(config: Config, arch: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights on every rank, so that sharding them later needs no broadcast and no rank count matters."""
    torch.manual_seed(seeding.torch_seed(config.seed, "weights"))
    return AutoModelForCausalLM.from_config(
        arch, dtype=dtype, attn_implementation=config.attention.implementation.value
    )


def _pretrained_model(config: Config, dtype: torch.dtype, deepspeed_dict: dict[str, Any]) -> PreTrainedModel:
    if config.engine.zero_stage != 3:
        return _from_pretrained(config.model, dtype, config.attention.implementation)
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards the weights while reading them for as long as this object lives.
    sharding = HfDeepSpeedConfig(deepspeed_dict)
    model = _from_pretrained(config.model, dtype, config.attention.implementation)
    del sharding
    return model


def _from_pretrained(spec: ModelConfig, dtype: torch.dtype, attention: AttentionImplementation) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            spec.path,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention.value,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={spec.path}: the weights cannot be loaded ({_first_line(error)})") from error


def _clex_for_training(config: Config, base_inv_freq: torch.Tensor) -> Clex:
    """The field of an earlier run if `model.path` holds one of the same shape, else a fresh one."""
    scaling = config.scaling
    if config.model.path and model_directory.has_clex(Path(config.model.path)):
        clex, _, record = model_directory.read_clex(Path(config.model.path))
        require(
            record.act == scaling.act.value, "scaling.act", scaling.act.name, f"{config.model.path} has {record.act}"
        )
        logger.info("continuing the vector field of %s", config.model.path)
        return clex
    return Clex(
        base_inv_freq,
        t_max=scaling.t_max,
        param_factor=scaling.param_factor,
        act=scaling.act.value,
        official_ntk_base=scaling.official_ntk_base,
        tolerance=scaling.tolerance,
        seed=config.seed,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
