"""Activation offload: only the inputs of recomputed layers move, and results are bitwise equal."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from clex_train.engine import activation_offload, token_loss
from clex_train.models.memory_options import recompute_layers
from tests.engine.test_token_loss import ROWS, TOKENS, build, rows


def gradients(model) -> list[torch.Tensor]:
    ids, labels = rows()
    token_loss.loss_from_logits(model, token_loss.shifted(labels), input_ids=ids).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_offload_changes_no_bit_on_a_cpu(family: str) -> None:
    plain, offloaded = build(family), build(family)
    for model in (plain, offloaded):
        recompute_layers(model)
    activation_offload.install(offloaded)
    assert all(torch.equal(one, other) for one, other in zip(gradients(plain), gradients(offloaded), strict=True))


def test_only_the_input_of_each_layer_is_moved_and_restored() -> None:
    model, gone, back = build("llama"), [], []

    def pack(tensor):
        gone.append(tensor.shape)
        return tensor.clone()

    def unpack(tensor):
        back.append(tensor.shape)
        return tensor

    recompute_layers(model)
    activation_offload.install(model, lambda: saved_tensors_hooks(pack, unpack))
    gradients(model)
    layers = model.config.num_hidden_layers
    assert [shape for shape in gone if len(shape) == 3] == [(ROWS, TOKENS, 32)] * layers
    # torch's checkpoint saves an empty tensor as well.
    assert all(shape.numel() == 0 for shape in gone if len(shape) != 3)
    assert len(back) == len(gone)
