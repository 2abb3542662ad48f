"""The digest of frozen weights: any change shows, and the number of ranks does not."""

import pytest
import torch
from torch import nn

from clex_train.adapters import frozen_weights
from clex_train.utils import distributed
from tests.adapters.adapted import adapt
from tests.engine.test_token_loss import build


def test_trained_weights_do_not_count_and_every_frozen_one_does():
    model = build("llama")
    adapt(model)
    before = frozen_weights.digest(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight += 1
    assert frozen_weights.digest(model) == before
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    saved = weight.clone()
    weight.view(torch.int32)[3, 5] ^= 1
    assert frozen_weights.digest(model) != before, "one bit"
    weight.copy_(saved)
    assert frozen_weights.digest(model) == before
    weight[[0, 1]] = saved[[1, 0]]
    assert frozen_weights.digest(model) != before, "the same values in another order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_have_the_digest_of_the_whole(dtype, ranks, monkeypatch):
    monkeypatch.setattr(frozen_weights, "CHUNK", 10)
    whole = nn.Linear(7, 5).to(dtype).requires_grad_(False)
    expected = frozen_weights.digest(whole)
    parts: list[list[int]] = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append([frozen_weights._own_sum(_shard(parameter, rank, ranks)) for parameter in whole.parameters()])
    monkeypatch.setattr(distributed, "gather_objects", lambda own: parts)
    for parameter in whole.parameters():
        _shard(parameter, 0, ranks)
    assert frozen_weights.digest(whole) == expected


def _shard(parameter, rank: int, ranks: int):
    """Give a parameter what ZeRO-3 gives it: this rank's equal part, of which the last ends in rubbish."""
    length = -(-parameter.numel() // ranks)
    padded = nn.functional.pad(parameter.detach().flatten(), (0, ranks * length - parameter.numel()), value=3.0)
    parameter.ds_tensor, parameter.ds_numel = padded[rank * length : (rank + 1) * length], parameter.numel()
    return parameter
