"""Random models with a harsh field, in which a wrong order, position or magnitude cannot hide.

Factors from 0.5 to 26 in no order, and attention so peaked that plain RoPE differs by a tenth to a half in log p.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clex_train.attention.select import supports_sdpa
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.models.directory import write_clex
from clex_train.models.load import LoadedModel, load_for_evaluation
from clex_train.rope.native import install_native
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable
from tests.evaluation.model_directories import save_tokenizer
from tests.rope.rotary_families import CONTEXT, VOCABULARY, tiny_model

T = 4.0
FACTORS = [3.0, 0.5, 26.0, 1.0, 7.0, 0.9, 13.0, 2.0]
OWN: dict[str, dict[str, Any]] = {"cohere": {"logit_scale": 1.0}}
"""Settings without which a family's logits are too small to tell models apart."""


def harsh_table(base: Tensor) -> FrequencyTable:
    """Return frequencies for t in {1, 2, 4}: harsh at 4, halfway there at 2."""
    factors = torch.tensor(FACTORS, dtype=torch.float64).repeat(-(-len(base) // len(FACTORS)))[: len(base)]
    grid = torch.tensor([1.0, 2.0, T], dtype=torch.float64)
    return FrequencyTable(grid, torch.stack([base, base / factors.sqrt(), base / factors]), "clex", CONTEXT, "harsh")


def harsh_model(family: str, log_scale: LogScale = LogScale.off, **settings: Any) -> LoadedModel:
    """Build a model in memory, as training leaves it before it writes `final/`."""
    model = tiny_model(family, **{**OWN.get(family, {}), **settings})
    handle = install_native(model, CONTEXT)
    field = Clex(handle.base_inv_freq, t_max=T)
    loaded = LoadedModel(model, handle, CONTEXT, clex=field, table=harsh_table(handle.base_inv_freq))
    loaded.log_scale = log_scale
    return loaded


def save_harsh(folder: Path, family: str, log_scale: LogScale = LogScale.off, **settings: Any) -> Path:
    """Save such a model with the RoPE of its base in config.json, as versions before format 2 did."""
    loaded = harsh_model(family, log_scale, **settings)
    loaded.model.save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    assert loaded.clex is not None
    assert loaded.table is not None
    write_clex(folder, loaded.clex, loaded.table, CONTEXT, log_scale)
    return folder


def load(folder: Path) -> LoadedModel:
    """Load a directory by the product."""
    return load_for_evaluation(ModelConfig(path=str(folder)))


def load_plain(folder: Path) -> PreTrainedModel:
    """Load a directory by transformers alone, with the family's attention."""
    # transformers before 5.21 offers SDPA for Gemma 2 and drops its cap.
    named = {} if supports_sdpa(AutoConfig.from_pretrained(folder)) else {"attn_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **named)
    return model.eval()


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return log p of every token at every position [B, S, V]."""
    return model(ids).logits.float().log_softmax(-1)
