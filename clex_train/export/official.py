"""Export to the layout of the original CLEX code (DAMO-NLP-SG/CLEX), which that code can load.

    config.json           rope_scaling = {"type": "clex", ...}, log_scale, max_position_embeddings = L, rope_theta
    model*.safetensors    the stock model's weights under their names, and <body>.clex_layer.* in addition

`models.official` reads it back. Settings that the format cannot express are refused, never approximated.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clex_train.config.scaling import LogScale
from clex_train.models.load import LoadedModel, bars_on_a_terminal
from clex_train.models.official import official_config
from clex_train.models.official_field import official_tensors
from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import atomic_directory

logger = log.get(__name__)

WEIGHTS, INDEX, FIELD = "model.safetensors", "model.safetensors.index.json", "model-clex.safetensors"
# A reader needs memory for one shard besides the model.
SHARD_SIZE = "5GB"


def write_official(directory: Path, loaded: LoadedModel, log_scale: LogScale | None = None) -> None:
    """Write the model and its vector field in the official layout, atomically.

    `log_scale` is written into the config, `off` or `official`; the default is the policy of the training run. Raises
    `ConfigError` when the layout cannot express the model: no field, another NTK base, frequencies or an attention
    factor of another scaling, another log-scaling.
    """
    if loaded.clex is None:
        raise ConfigError("clex.json", None, "the model has no CLEX field; only one trained with scaling=clex has it")
    policy = log_scale or loaded.log_scale
    require_known(policy)
    own = loaded.handle.traits.base[loaded.handle.traits.scaled]
    if own.attention_factor != 1.0:
        reason = "the official layout has none; format=huggingface and the others keep it"
        raise ConfigError("attention factor", f"{own.attention_factor:g}", reason)
    # Before anything is written: it refuses what the layout cannot express.
    facts = official_config(loaded.model.config, loaded.clex, loaded.context_len, policy is LogScale.official)
    with atomic_directory(directory) as folder:
        with bars_on_a_terminal():
            loaded.model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        _add_tensors(folder, official_tensors(loaded.clex, f"{loaded.model.base_model_prefix}."))
        # Replaces the stock config.json that save_pretrained wrote.
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
    logger.info("saved the model in the official layout to %s", directory)


def require_known(policy: LogScale) -> None:
    """Raise `ConfigError` for a log-scaling policy that the layout cannot express."""
    if policy not in (LogScale.off, LogScale.official):
        raise ConfigError(
            "log_scale",
            policy.name,
            "the official layout knows `off` and `official` (which also scales below L); name one of them",
        )


def _add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Add tensors to the single weight file, or as a shard of their own where there are several."""
    # An own shard avoids rewriting gigabytes; a single file has no index that could name another one.
    index = folder / INDEX
    if not index.exists():
        save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return
    save_file(tensors, folder / FIELD, metadata={"format": "pt"})
    listing: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    listing["weight_map"] |= dict.fromkeys(tensors, FIELD)
    listing["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n", encoding="utf-8")
