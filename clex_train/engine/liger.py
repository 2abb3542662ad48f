"""Liger's fused RMSNorm and SwiGLU kernels (arXiv 2410.10989), swapped in on the instance.

    RMSNorm   w * x / sqrt(mean x^2 + eps)             SwiGLU   W_down (silu(W_gate x) * (W_up x))

A module is replaced only if its class computes exactly this, rounding included, which a trial on a few numbers shows.
Norms of some families scale by 1 + w or round elsewhere.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clex_train.config.engine import Liger
from clex_train.utils.errors import require
from clex_train.utils.versions import install_command


class Kernels(NamedTuple):
    """The two fused operations."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [..., W], weight [W], epsilon) -> [..., W]."""
    silu_product: Callable[[Tensor, Tensor], Tensor]
    """(a, b) -> silu(a) * b."""


def refusal() -> str | None:
    """Return the reason why Liger's kernels cannot run on this machine, or None if they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    # `find_spec` instead of an import: importing triton takes seconds.
    absent = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def check(choice: Liger) -> None:
    """Raise `ConfigError` when the configuration requires kernels that cannot run here."""
    reason = refusal()
    require(
        choice is not Liger.always or reason is None,
        "engine.liger",
        choice.name,
        f"{reason}: {install_command('gpu')} on a machine with one, or use auto",
    )


def kernels() -> Kernels:
    """Return Liger's kernels. Call it only where `refusal` returns None."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    # In place, the backward would overwrite the gradient of the norm's output, which a hook may still read.
    return Kernels(lambda x, weight, epsilon: liger_rms_norm(x, weight, epsilon, in_place=False), liger_swiglu)


def install(model: nn.Module, kernels: Kernels) -> list[nn.Module]:
    """Replace the forward of every plain RMSNorm and SwiGLU; return the modules, for `remove`."""
    # transformers' own `use_liger_kernel` patches the classes of the family, for every model of the process.
    replaced = []
    for module in model.modules():
        forward = _norm_by(kernels) if is_rms_norm(module) else _mlp_by(kernels) if is_swiglu(module) else None
        if forward is not None:
            module.forward = MethodType(forward, module)
            replaced.append(module)
    return replaced


def remove(modules: list[nn.Module]) -> None:
    """Restore the original forward of modules that `install` returned."""
    for module in modules:
        del module.__dict__["forward"]


def is_rms_norm(module: nn.Module) -> bool:
    """Return True if the module computes Llama's RMSNorm, bit for bit in bfloat16."""
    if "forward" in module.__dict__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    epsilon, weight = getattr(module, "variance_epsilon", None), torch.linspace(0.5, 1.7, 8, dtype=torch.bfloat16)
    if not isinstance(epsilon, float):
        return False
    # bfloat16 is where families differ: a product with `w` before or after rounding to the input's dtype.
    x = torch.linspace(-3, 4, 40).sin().reshape(5, 8).to(torch.bfloat16)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return _gives(module, SimpleNamespace(weight=weight, variance_epsilon=epsilon), x, expected)


def is_swiglu(module: nn.Module) -> bool:
    """Return True if the module computes Llama's gated MLP with silu."""
    parts = {name for name, _ in module.named_children()}
    if "forward" in module.__dict__ or parts != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    act: Any = module.act_fn
    x = torch.linspace(-3, 4, 40, dtype=torch.float64).reshape(5, 8)
    # Cheap functions instead of weights, which may be sharded or on the meta device.
    stand_in = SimpleNamespace(
        gate_proj=lambda x: 2 * x, up_proj=lambda x: x + 1, down_proj=lambda x: x / 4, act_fn=act
    )
    return _gives(module, stand_in, x, nn.functional.silu(2 * x) * (x + 1) / 4)


def _gives(module: nn.Module, stand_in: SimpleNamespace, x: Tensor, expected: Tensor) -> bool:
    """Return True if the class's forward returns `expected` for `x`, with `stand_in` as `self`."""
    try:
        found = type(module).forward(stand_in, x)
    except (AttributeError, TypeError, RuntimeError):
        # The forward uses something that `stand_in` lacks, so it computes something else.
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected)


def _norm_by(kernels: Kernels) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _mlp_by(kernels: Kernels) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(kernels.silu_product(self.gate_proj(x), self.up_proj(x)))
        return output

    return forward
