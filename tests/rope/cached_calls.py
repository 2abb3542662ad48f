"""Calls of a small model through a KV cache, for tests."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache, QuantizedLayer

from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens

T_MAX = 5.0
PIECES = [10, 6, 1, 1, 15, 1, 14, 1]  # t moves with the third, the fifth and the last piece.


def patched(family: str = "llama", **overrides: object) -> tuple[PreTrainedModel, RotaryHandle, FrequencyTable]:
    model = tiny_model(family, **overrides)
    handle = install_rotary(model, CONTEXT)
    table = ntk_table(handle.base_inv_freq, scale_grid(T_MAX))
    handle.use(table)
    return model, handle, table


@torch.no_grad()
def feed(model: PreTrainedModel, ids: torch.Tensor, pieces: list[int], cache: object = None) -> torch.Tensor:
    logits, start = [], 0
    for length in pieces:
        output = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + length
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded_call(pad: list[int], stop: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Build the call for tokens start..stop-1 of rows with `pad` tokens of left padding each."""
    ids, padding = tokens(len(pad), 34)[:, :stop], torch.tensor(pad)[:, None]
    mask = (torch.arange(stop)[None] >= padding).long()
    positions = (torch.arange(start, stop)[None] - padding).clamp(min=0)
    return {"input_ids": ids[:, start:], "attention_mask": mask, "position_ids": positions}


class QuantisedLayers(QuantizedCache):
    """A quantised cache without a quantisation library: transformers' base layers, rounding to `steps`."""

    def __init__(self, steps: float | None, residual_length: int = 8) -> None:
        class Layer(QuantizedLayer):
            def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
                return tensor.clone() if steps is None else (tensor * steps).round()

            def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
                return tensor if steps is None else tensor / steps

        Cache.__init__(self, layer_class_to_replicate=lambda: Layer(residual_length=residual_length))
