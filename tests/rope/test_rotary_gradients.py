"""Gradients of the loss with respect to the frequencies, against float64 finite differences of an independent model."""

import pytest
import torch
from torch import Tensor, nn

from clex_train.rope.patch import install_rotary
from clex_train.rope.rotary import ScaledRotary
from clex_train.scaling.spectrum import Spectrum
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens

ROWS, LENGTH, T = 4, 24, 3.0


class ExactRotary(nn.Module):
    """Compute cos and sin in float64, without reduction or rounding."""

    def __init__(self, theta: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.theta, self.positions = theta, positions

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (self.positions[..., None] * self.theta).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


def sampled_positions() -> Tensor:
    grid = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return (grid * T * CONTEXT).sort(dim=1).values


@torch.no_grad()
def finite_differences(family: str, theta: Tensor) -> Tensor:
    """Compute d loss / d theta by central differences in log theta, all in float64."""
    model = in_float64(tiny_model(family))
    parent = next(m for m in model.modules() if "rotary_emb" in dict(m.named_children()))
    gradient = torch.zeros_like(theta)
    for j in range(len(theta)):
        losses = []
        for step in (1e-4, -1e-4):
            moved = theta.clone()
            moved[j] *= 1 + step
            parent.rotary_emb = ExactRotary(moved, sampled_positions())
            losses.append(float64_loss(model))
        gradient[j] = (losses[0] - losses[1]) / (2e-4 * theta[j])
    return gradient


def in_float64(model: nn.Module) -> nn.Module:
    """Convert the model to float64; the stock RMS norm would round to float32 inside."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                exact.weight.data.copy_(child.weight)
                setattr(module, name, exact)
    return model.double()


def float64_loss(model: nn.Module) -> Tensor:
    """Compute the cross-entropy without the stock loss's rounding to float32."""
    ids = tokens(ROWS, LENGTH)
    logits = model(input_ids=ids, use_cache=False).logits
    assert logits.dtype == torch.float64
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradient(family: str, dtype: torch.dtype = torch.float32, pieces: int = 1, checkpointing: bool = False) -> Tensor:
    """Compute d loss / d theta as training collects it, over `pieces` micro batches."""
    model, ids, positions = tiny_model(family, dtype=dtype), tokens(ROWS, LENGTH), sampled_positions()
    handle = install_rotary(model, CONTEXT)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    theta = (handle.base_inv_freq / 2).requires_grad_()
    for rows in torch.arange(ROWS).chunk(pieces):
        with handle.training(Spectrum(theta, T), positions[rows]):
            (model(input_ids=ids[rows], labels=ids[rows], use_cache=False).loss / pieces).backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_gradient_agrees_with_finite_differences(family: str) -> None:
    found = gradient(family)
    model = tiny_model(family)
    expected = finite_differences(family, install_rotary(model, CONTEXT).base_inv_freq / 2)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_activation_checkpointing_changes_no_bit_of_the_gradient(family: str) -> None:
    assert torch.equal(gradient(family, checkpointing=True), gradient(family))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_accumulate_to_the_gradient_of_the_batch(checkpointing: bool) -> None:
    whole, pieces = gradient("llama"), gradient("llama", pieces=4, checkpointing=checkpointing)
    assert torch.allclose(pieces, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_bfloat16_model_accumulates_gradients_of_layers_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    handle, seen = install_rotary(model, CONTEXT), []
    rotary, attention = handle.rotary, model.model.layers[0].self_attn
    rotary.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    attention.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    ids, theta = tokens(1, 8), handle.base_inv_freq.requires_grad_()
    with handle.training(Spectrum(theta, T)):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert isinstance(rotary, ScaledRotary)
    assert [cos.dtype for cos in seen] == [torch.float32, torch.bfloat16]
    assert theta.grad is not None
    assert theta.grad.dtype == torch.float64


def test_the_bfloat16_gradient_is_parallel_to_the_float32_one() -> None:
    exact, rounded = gradient("llama"), gradient("llama", dtype=torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.99
