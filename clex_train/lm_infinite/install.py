"""LM-Infinite on a Hugging Face causal LM: `apply_lm_infinite(model, n_local, n_global)`, reversed by `undo()`.

One function is registered with transformers' attention interface, and one in place of its masks that passes the padding
on, so no n x n mask is built. A hook on each attention module makes the model rotate by cos = 1, sin = 0: queries, keys
and caches stay unrotated, and `lambda_attention` rotates them by distance with the model's own rotation.
Shapes: `B` batch, `H` heads, `K` key heads, `S` new tokens, `T` keys, `D` head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clex_train.attention.layer_probe import layer_type, layer_window
from clex_train.lm_infinite.adapters import ADAPTERS, SinusoidTables, clamp_table_positions, no_rotation, uses_alibi
from clex_train.lm_infinite.back_ends import AUTO, BACK_ENDS, BackEndChoice
from clex_train.lm_infinite.cache import LambdaCache, LambdaCacheLayer, spare_slots
from clex_train.lm_infinite.compatibility import LAYER, NAME, attention_modules, check_call, model_type, trained_context
from clex_train.lm_infinite.lambda_attention import rotated_span_len
from clex_train.lm_infinite.layer import LambdaLayer
from clex_train.lm_infinite.middle_tokens import Middle
from clex_train.lm_infinite.rotation import RotarySite, RotationTables, find_rotary_site, rotation_function
from clex_train.lm_infinite.stream import Rotation
from clex_train.utils import log
from clex_train.utils.errors import ConfigError

logger = log.get(__name__)


def apply_lm_infinite(
    model: nn.Module,
    n_local: int,
    n_global: int,
    block_len: int | None = None,
    middle: Middle | None = None,
    back_end: str = AUTO,
) -> "LmInfinite":
    """Let every layer with full attention see the `n_local` latest tokens and the `n_global` first ones.

    `middle` lets tokens between them in (`attention.middle`) and needs a cache that keeps all keys. Layers with a
    sliding window of their own keep it. `block_len` (queries per block) and `back_end` (`auto` or a key of
    `back_ends.BACK_ENDS`) change the cost, not the result. Combines with `install_rotary` in either order. Warns if
    n_local exceeds the model's trained context or n_global >= n_local.

    Raises:
        ValueError: a size or back end out of range, or a model that is patched already.
        ConfigError: a model type that lm_infinite does not support.
    """
    if n_local < 1 or n_global < 0:
        raise ValueError(f"n_local={n_local}, n_global={n_global}: must be at least 1 and 0 tokens")
    if block_len is not None and block_len < 1:
        raise ValueError(f"block_len={block_len}: must be at least 1 query")
    return LmInfinite(model, n_local, n_global, block_len, middle, BackEndChoice(back_end))


class LmInfinite:
    """LM-Infinite applied to one model; created by `apply_lm_infinite`."""

    def __init__(
        self,
        model: nn.Module,
        n_local: int,
        n_global: int,
        block_len: int | None,
        middle: Middle | None,
        choice: BackEndChoice,
    ) -> None:
        self.model, self.n_local, self.n_global, self.middle = model, n_local, n_global, middle
        attention = attention_modules(model)
        windows = [layer_window(module) for module in attention]
        # One set of rotation tables serves all layers: it covers the longest window and the longest rotated span.
        longest = max(n_local, *(window or 1 for window in windows))
        rotations, site = _rotations(
            model, attention, longest + max(_longest_span(longest, block_len), spare_slots(longest))
        )
        # After the checks that raise, so that a refused model leaves no warning.
        self._warn()
        adapter = ADAPTERS.get(model_type(model))
        self.layers = [
            LambdaLayer(
                module,
                n_local if window is None else window,
                # A layer's own window has no starting tokens: the family was trained without them.
                n_global if window is None else 0,
                block_len,
                rotation,
                site,
                None if middle is None or window is not None else middle.for_layer(module.layer_idx),
                adapter,
                choice,
            )
            for module, window, rotation in zip(attention, windows, rotations, strict=True)
        ]
        # For example `first_layer` beyond the last one: the option would silently have no effect.
        if middle is not None and all(layer.middle is None for layer in self.layers):
            raise ConfigError("middle", middle, f"none of the model's {len(self.layers)} layers uses it")
        self._insert()

    def new_cache(self) -> LambdaCache:
        """Create an empty cache for calls of the model and `generate`; its size does not grow with the stream.

        Raises:
            ValueError: a middle is set, which needs all keys.
        """
        if self.middle is not None:
            raise ValueError(f"middle={self.middle}: it needs all keys; use a DynamicCache")
        return LambdaCache([LambdaCacheLayer(layer.n_local, layer.n_global) for layer in self.layers])

    def undo(self) -> None:
        """Restore the model. Caches filled in the meantime must be discarded. Calling it again has no effect."""
        if not self._removals:
            return
        # Every config its own name: a composite model may mix implementations.
        for config, implementation in self._before:
            config._attn_implementation = implementation
        for removal in self._removals:
            removal.remove()
        for layer in self.layers:
            # A model may have been patched again since; remove only what belongs to this handle.
            if getattr(layer.module, LAYER, None) is layer:
                layer.leave()
        self._removals.clear()

    def _insert(self) -> None:
        modules = [layer.module for layer in self.layers]
        # By identity: layers usually share one config, but a text model inside a larger one has its own.
        configs: dict[int, Any] = {id(m.config): m.config for m in (*modules, self.model) if hasattr(m, "config")}
        self._before = [(config, config._attn_implementation) for config in configs.values()]
        for config in configs.values():
            config._attn_implementation = NAME
        self._removals: list[RemovableHandle] = [self.model.register_forward_pre_hook(check_call, with_kwargs=True)]
        if model_type(self.model) == "gptj":
            # GPT-J reads its table before the layers run, so hooks on them would be too late.
            self._removals += clamp_table_positions(self.model)
        for layer in self.layers:
            layer.enter()
            self._removals.append(layer.module.register_forward_pre_hook(layer.before_call, with_kwargs=True))

    def _warn(self) -> None:
        trained = trained_context(self.model)
        if trained is not None and self.n_local > trained:
            exceeds = "n_local=%d exceeds the model's trained context of %d tokens: it has not seen such distances"
            logger.warning(f"{exceeds} unless its frequencies are scaled", self.n_local, trained)
        if self.n_global >= self.n_local:
            usual = "n_global=%d is not below n_local=%d: usual values are 10 to 100"
            logger.warning(usual, self.n_global, self.n_local)


def _rotations(
    model: nn.Module, attention: list[Any], num_positions: int
) -> tuple[list[Callable[[Tensor], Rotation]], RotarySite | None]:
    """Return the rotation of each layer, and the rotary module behind it, if any."""
    kind = model_type(model)
    if kind in ADAPTERS and uses_alibi(attention[0], kind):
        # ALiBi enters through the softmax rule's slopes instead.
        return [no_rotation] * len(attention), None
    if kind == "gptj":
        return [SinusoidTables(attention[0], num_positions).rotation] * len(attention), None
    tables = RotationTables(find_rotary_site(model), num_positions)
    rotate: list[Callable[[Tensor], Rotation]] = [
        partial(
            tables.rotation,
            layer_idx=module.layer_idx,
            layer_type=layer_type(module),
            rotate=rotation_function(module),
        )
        for module in attention
    ]
    return rotate, tables.site


def _longest_span(n_local: int, block_len: int | None) -> int:
    """Return the most queries whose keys are rotated at once, whichever back end a call takes."""
    # `auto` chooses a back end per call, so the tables must suffice for the longest blocks of any.
    lengths = [block_len] if block_len else [back_end.block_len(n_local) for back_end in BACK_ENDS.values()]
    return max(rotated_span_len(n_local, length) for length in lengths)
