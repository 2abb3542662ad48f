"""Options that are installed on a model with adapters: the same loss and gradients as without them."""

import pytest
import torch

from clex_train.engine import liger, tiled_mlp, token_loss
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models.memory_options import decoder_layers, recompute_layers
from clex_train.rope.patch import install_rotary
from clex_train.scaling.spectrum import Spectrum
from clex_train.training.non_finite import find
from tests.adapters.adapted import LONGLORA, adapt
from tests.engine.test_token_loss import TILE, TOKENS, build, rows

TARGETS = {"targets": ["all-linear"]}


def recomputed(model) -> None:
    recompute_layers(model)


def tiled_mlps(model) -> None:
    tiled_mlp.install(tiled_mlp.find(decoder_layers(model)), TILE)


def tiled_loss(model) -> None:
    token_loss.install_tiles(model, TILE)


def lambda_mask(model) -> None:
    # A window of the whole row hides nothing, so that the numbers are those of full attention.
    apply_lm_infinite(model, TOKENS, 1)


def fused_kernels(model) -> None:
    # Liger's own need a GPU; these compute the same.
    def rms_norm(x, weight, epsilon):
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    kernels = liger.Kernels(rms_norm, lambda gate, up: torch.nn.functional.silu(gate) * up)
    assert len(liger.install(model, kernels)) == 2 * 3 + 1


def all_of_them(model) -> None:
    for install in (fused_kernels, recomputed, tiled_mlps, tiled_loss):
        install(model)


@pytest.mark.parametrize("beside", [{}, LONGLORA], ids=["lora", "longlora"])
@pytest.mark.parametrize("install", [recomputed, fused_kernels, tiled_mlps, tiled_loss, lambda_mask, all_of_them])
def test_an_option_changes_no_gradient_of_adapters_or_frequencies(install, beside):
    plain, other = build("llama"), build("llama")
    for model in (plain, other):
        adapt(model, **TARGETS, **beside)
    install(other)
    (loss, gradients), (found, others) = (step(model) for model in (plain, other))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a loss, and the gradients of the trained parameters and of the frequencies."""
    ids, labels = rows()
    handle = install_rotary(model, 64)
    leaf = handle.base_inv_freq.clone().requires_grad_()
    in_tiles = "forward" in model.__dict__
    with handle.training(Spectrum(leaf)):
        loss = (token_loss.loss_in_tiles if in_tiles else token_loss.loss_from_logits)(
            model, token_loss.shifted(labels), input_ids=ids
        )
        loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return loss.detach(), {**trained, "frequencies": leaf.grad}


def test_a_fault_above_a_frozen_embedding_is_found():
    model, (ids, labels) = build("llama"), rows()
    adapt(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: out * float("nan"))
    found = find(model, lambda: token_loss.loss_from_logits(model, token_loss.shifted(labels), input_ids=ids))
    assert str(found) == "first in the output of model.layers.1.mlp"
    assert all(p.grad is None for p in model.parameters())
