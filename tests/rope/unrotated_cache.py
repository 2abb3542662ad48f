"""Slow reference with the semantics of the original code: unrotated cached keys, all rotated at the current theta.

Independent of `clex_train.rope`: the stock model runs with theta written into its own rotary buffer, and the cache
removes the rotation from its input and applies the current one to everything it returns.
"""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from clex_train.scaling.frequency_table import FrequencyTable


class UnrotatedCache(DynamicCache):
    """A cache of unrotated keys, except in the layers `kept`; `advance` must be called before each forward.

    `latent` is True where the rotated keys come as values, beside a latent that does not rotate.
    """

    def __init__(self, config: Any, interleaved: bool, kept: Collection[int] = (), latent: bool = False) -> None:
        super().__init__(config=config)
        self.interleaved, self.kept, self.latent = interleaved, kept, latent
        self.theta = self.new_positions = torch.empty(0)
        self.all_positions: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest, **more) -> tuple[Tensor, Tensor]:
        if layer_idx in self.kept:
            return super().update(key_states, value_states, layer_idx, *rest, **more)
        rotated, other = (value_states, key_states) if self.latent else (key_states, value_states)
        plain = self._rotate(rotated, self.new_positions, -1).to(rotated.dtype)
        given = (other, plain) if self.latent else (plain, other)
        found = super().update(*given, layer_idx, *rest, **more)
        rotated, other = reversed(found) if self.latent else found
        rotated = self._rotate(rotated, self.all_positions, +1).to(rotated.dtype)
        return (other, rotated) if self.latent else (rotated, other)

    def advance(self, theta: Tensor, positions: Tensor) -> None:
        """Set theta and positions of the next forward."""
        self.theta, self.new_positions = theta, positions
        before = [] if self.all_positions is None else [self.all_positions]
        self.all_positions = torch.cat([*before, positions], dim=1)

    def _rotate(self, keys: Tensor, positions: Tensor, sign: int) -> Tensor:
        """Multiply by exp(i * sign * position * theta) in float64."""
        width = 2 * len(self.theta)
        rotary, rest = keys[..., :width].double(), keys[..., width:].double()
        angle = sign * positions[:, None, :, None].double() * self.theta
        pairs = rotary.unflatten(-1, (-1, 2)) if self.interleaved else rotary.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
        )
        flat = turned.flatten(-2) if self.interleaved else turned.transpose(-1, -2).flatten(-2)
        return torch.cat((flat, rest), dim=-1)


def with_own_embeddings(layer: nn.Module, rotary: nn.Module, positions: Tensor) -> RemovableHandle:
    """Give `layer` the cos and sin of the model's own rotary module."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {
            **kwargs,
            "position_embeddings": rotary(kwargs["hidden_states"] if not args else args[0], positions),
        }

    return layer.register_forward_pre_hook(replace, with_kwargs=True)


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    ids: Tensor,
    lengths: list[int],
    table: FrequencyTable,
    context_len: int,
    interleaved: bool = False,
    pad: Tensor | None = None,
    kept: Collection[int] = (),
    latent: bool = False,
) -> Tensor:
    """Compute the logits [B, S, V] of a stock model fed `ids` in pieces of `lengths`.

    `pad` [B] counts left padding per row. t is the least grid member >= n / L after each piece, n being the tokens so
    far of the row without padding. Layers `kept` have the model's own RoPE or none, although all share one module.
    """
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    buffer = "inv_freq" if hasattr(rotary, "inv_freq") else "full_attention_inv_freq"
    types = getattr(model.config, "layer_types", None) or []
    local = {i for i, kind in enumerate(types) if kind == "sliding_attention"} if buffer != "inv_freq" else set()
    cache, logits, start = UnrotatedCache(model.config, interleaved, {*local, *kept}, latent), [], 0
    stock = copy.deepcopy(rotary)
    pad = torch.zeros(len(ids), dtype=torch.long) if pad is None else pad
    own = getattr(rotary, buffer).clone()
    for length in lengths:
        stop = start + length
        needed = (stop - int(pad.min())) / context_len
        row = next(i for i, t in enumerate(table.t.tolist()) if t >= needed)
        positions = (torch.arange(start, stop)[None] - pad[:, None]).clamp(min=0)
        getattr(rotary, buffer).copy_(table.inv_freq[row])
        cache.advance(table.inv_freq[row], positions)
        hooks = [with_own_embeddings(model.model.layers[i], stock, positions) for i in kept]
        mask = (torch.arange(stop)[None] >= pad[:, None]).long()
        piece = model(ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(piece.logits)
        start = stop
        for hook in hooks:
            hook.remove()
    getattr(rotary, buffer).copy_(own)
    return torch.cat(logits, dim=1)
