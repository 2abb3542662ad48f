"""Tiled MLPs: the same loss and gradients, the number of passes, and peak memory."""

import pytest
import torch
from torch import nn

from clex_train.engine import tiled_mlp, token_loss
from clex_train.models.memory_options import decoder_layers, recompute_layers
from tests.engine.test_token_loss import FAMILIES, ROWS, TOKENS, build, gradients, rows
from tests.helpers.largest_tensor import LargestTensor

DENSE = [family for family in FAMILIES if family != "mixtral"]
TILE = 7


def tiled(model: nn.Module, tile_len: int = TILE) -> list[nn.Module]:
    mlps = tiled_mlp.find(decoder_layers(model))
    tiled_mlp.install(mlps, tile_len)
    return mlps


def loss_of(model: nn.Module) -> torch.Tensor:
    ids, labels = rows()
    return token_loss.loss_from_logits(model, token_loss.shifted(labels), input_ids=ids)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_match_those_of_the_whole_mlp(family: str, recomputed: bool) -> None:
    model = build(family)
    loss = loss_of(model)
    expected = gradients(model, loss)
    if recomputed:
        recompute_layers(model)
    assert all(tiled_mlp.is_tiled(mlp) for mlp in tiled(model))
    found = loss_of(model)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_bfloat16_weight_gradients_are_as_close_to_float32_as_those_of_one_product() -> None:
    exact, whole, in_tiles = (build("llama").to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    exact.load_state_dict({name: tensor.float() for name, tensor in whole.state_dict().items()})
    tiled(in_tiles, 2)
    true, at_once, summed = (gradients(model, loss_of(model)) for model in (exact, whole, in_tiles))
    for name in (name for name in true if ".mlp." in name):
        distance, allowed = ((found[name].float() - true[name]).norm() for found in (summed, at_once))
        assert distance <= 1.2 * allowed, name


@pytest.mark.parametrize(("recomputed", "passes"), [(False, 2), (True, 2)])
def test_tokens_pass_twice_under_recomputation_and_each_weight_completes_once(recomputed: bool, passes: int) -> None:
    model = build("llama")
    if recomputed:
        recompute_layers(model)
    seen, complete = [], []
    for mlp in tiled(model):
        mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        for parameter in mlp.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: complete.append(1))
    loss_of(model).backward()
    assert max(seen) == TILE
    assert sum(seen) == passes * 2 * ROWS * TOKENS
    assert len(complete) == 2 * 3


def test_activations_inside_an_mlp_exist_for_one_tile_at_a_time() -> None:
    model = build("llama", intermediate_size=4096)
    hidden = torch.randn(2, 100, 32, requires_grad=True)
    (mlp, *_) = tiled(model, 8)
    weights = 32 * 4096
    with LargestTensor() as largest:
        mlp(hidden).sum().backward()
    assert largest.elements == weights
    assert weights < 2 * 100 * 4096


def test_weights_get_gradients_even_if_their_input_does_not() -> None:
    model = build("llama")
    hidden = torch.randn(2, 30, 32)
    mlp = model.model.layers[0].mlp
    mlp(hidden).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in mlp.parameters()]
    mlp.zero_grad()
    tiled(model)
    mlp(hidden).square().sum().backward()
    for parameter, gradient in zip(mlp.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-4)


def test_frozen_weights_get_no_gradient() -> None:
    model = build("llama")
    (mlp, *_) = tiled(model)
    mlp.up_proj.weight.requires_grad_(False)
    loss_of(model).backward()
    assert mlp.up_proj.weight.grad is None
    assert mlp.gate_proj.weight.grad is not None


def test_without_gradients_tiles_give_the_same_output() -> None:
    model, hidden = build("llama"), torch.randn(2, 30, 32)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        expected = mlp(hidden)
        tiled(model)
        torch.testing.assert_close(mlp(hidden), expected)
        torch.testing.assert_close(mlp(hidden[:, :3]), expected[:, :3])


class Layer(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Layer(attention=nn.Linear(2, 2)), "Layer has no MLP under the names mlp, feed_forward, ffn"),
        (Layer(mlp=Layer(experts=nn.Linear(2, 2))), "Layer is a mixture of experts"),
        (Layer(mlp=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))), "Sequential has dropout"),
        (Layer(ffn=nn.Sequential(nn.Conv1d(2, 2, 3))), "Sequential has weights in Conv1d"),
    ],
)
def test_an_mlp_that_mixes_tokens_is_refused(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiled_mlp.find([layer])
