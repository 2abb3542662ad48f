"""Conversion between the ODE weights of released CLEX checkpoints (DAMO-NLP-SG/CLEX) and a `Clex`.

    model.clex_layer.proj_func.ode_up_proj    [P, H]    applied as x @ W
    model.clex_layer.proj_func.ode_down_proj  [H, P]
    model.clex_layer.inv_freq                 [P]       buffer, theta(1)

Their config has rope_scaling = {"type": "clex", "max_factor", "param_factor", "act", ...}. Their network reads
log theta_ntk at base 10000, whatever the model's base is (`official_ntk_base`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clex_train.scaling.clex import Clex
from clex_train.utils.errors import ConfigError

UP, DOWN, INV_FREQ = "clex_layer.proj_func.ode_up_proj", "clex_layer.proj_func.ode_down_proj", "clex_layer.inv_freq"


def is_official(tensors: Mapping[str, Tensor] | list[str]) -> bool:
    """Return True if a state dict, or a list of names, has the ODE under the official names."""
    return any(name.endswith(UP) for name in tensors)


def clex_from_official(
    tensors: Mapping[str, Tensor],
    rope_scaling: Mapping[str, Any],
    inv_freq: Float[Tensor, " P"],
    tolerance: float = 1e-6,
) -> Clex:
    """Build the ODE of a released checkpoint for its model's base frequencies `inv_freq` [P], and refine its grid.

    Raises `ConfigError`, naming the key, for a missing tensor, a rotary dimension that does not match the weights,
    weights that are not finite, or a `rope_scaling` of another type.
    """
    kind = rope_scaling.get("type", rope_scaling.get("rope_type"))
    if kind != "clex":
        raise ConfigError("rope_scaling.type", kind, "'clex' is expected with CLEX weights")
    if "max_factor" not in rope_scaling:
        raise ConfigError(
            "rope_scaling.max_factor is missing", None, "the largest scale factor that the ODE was trained for"
        )
    # From the weights themselves, so that a wrong `param_factor` in config.json does not matter.
    hidden = _find(tensors, UP).shape[-1]
    clex = Clex(
        inv_freq,
        t_max=float(rope_scaling["max_factor"]),
        param_factor=hidden / (2 * len(inv_freq)),
        act=str(rope_scaling.get("act", "silu")),
        official_ntk_base=True,
        tolerance=tolerance,
    )
    load_official(clex, tensors)
    # The grid that reaches `tolerance` depends on the weights, so it is chosen after they are loaded.
    clex.refine()
    return clex


@torch.no_grad()
def load_official(clex: Clex, tensors: Mapping[str, Tensor]) -> None:
    """Copy the official tensors into `clex`. Raises `ConfigError`, naming both shapes, when they do not fit."""
    # Found by the end of their names: the prefix is the path of the model's body, which differs between families.
    for suffix, weight in ((UP, clex.up), (DOWN, clex.down)):
        given = _find(tensors, suffix)
        if given.shape != weight.shape:
            raise ConfigError(
                f"{suffix} of shape {tuple(given.shape)}",
                None,
                f"the model's {len(clex.base_inv_freq)} rotated pairs need "
                f"{tuple(weight.shape)}; check the rotary dimension and rope_scaling.param_factor",
            )
        if not bool(torch.isfinite(given).all()):
            raise ConfigError(suffix, None, "the weights are not finite; copy the checkpoint again")
        weight.copy_(given)


def official_tensors(clex: Clex, prefix: str = "model.") -> dict[str, Tensor]:
    """Return the tensors of `clex` under their official names, float32; `prefix` is the path of the model's body."""
    return {
        prefix + UP: clex.up.detach().clone(),
        prefix + DOWN: clex.down.detach().clone(),
        prefix + INV_FREQ: clex.base_inv_freq.to(torch.float32),
    }


def official_rope_scaling(clex: Clex) -> dict[str, Any]:
    """Build the `rope_scaling` entry of the official config.json.

    Raises `ConfigError` for another field than the paper's, and for one that was trained with another NTK base than the
    official 10000.
    """
    if clex.kind != Clex.kind:
        remedy = "the official layout has the paper's field alone; export to huggingface, vllm or gguf"
        raise ConfigError("scaling.field", clex.kind, remedy)
    # The official code always uses base 10000, and would compute other frequencies from such a field.
    if not clex.official_ntk_base and not _starts_at_official_base(clex):
        raise ConfigError(
            "scaling.official_ntk_base",
            "false",
            "the official layout computes other frequencies from these weights; "
            "train with scaling.official_ntk_base=true, or export without the ODE",
        )
    num_pairs, hidden = clex.up.shape
    factor = hidden / (2 * num_pairs)
    return {
        "type": "clex",
        # Integers where possible, as in the released files.
        "max_factor": int(clex.t_max) if clex.t_max == int(clex.t_max) else clex.t_max,
        "param_factor": int(factor) if factor == int(factor) else factor,
        "act": clex.act,
        "time_dt": 0.01,
        "factor": 1,
    }


def _starts_at_official_base(clex: Clex) -> bool:
    pairs = torch.arange(len(clex.base_inv_freq), dtype=torch.float64)
    return torch.allclose(clex.base_inv_freq.cpu(), 10000.0 ** (-pairs / len(pairs)), rtol=1e-6)


def _find(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    for name, tensor in tensors.items():
        if name.endswith(suffix):
            return tensor
    raise ConfigError(f"no tensor named ...{suffix}", None, "not an official CLEX checkpoint")
