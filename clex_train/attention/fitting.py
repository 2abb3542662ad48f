"""Which models lm_infinite fits, and which calls of them: one line that names what is wrong otherwise."""

import ast
import inspect
import textwrap
from typing import Any

from torch import Tensor, nn

from clex_train.attention import whole_rows
from clex_train.attention.adapters import ADAPTERS
from clex_train.attention.log_scaling import own_window

NAME = "lm_infinite"
LAYER = "lm_infinite_layer"
UNSUPPORTED = {
    "cohere2": "its layers with full attention have no positions",
    "falcon_h1": "its layers have a recurrent state beside their attention",
    "codegen": "it packs its queries, keys and values by tensor-parallel shards of its own",
    "hunyuan_v1_dense": "it normalises keys after their rotation",
    "hunyuan_v1_moe": "it normalises keys after their rotation",
}


def model_kind(model: Any) -> str:
    """The model type as transformers names it."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention of every layer; `ValueError` naming the model type when lm_infinite does not fit it."""
    kind = model_kind(model)
    modules: list[Any] = list(model.modules())
    if any(hasattr(module, LAYER) for module in modules):
        raise ValueError("apply_lm_infinite: it is in force on this model already; undo() the earlier one")
    reason = UNSUPPORTED.get(kind)
    if hasattr(model.config, "qk_rope_head_dim"):
        reason = "it rotates a part of each key that is held apart"
    fits = _is_numbered if kind in ADAPTERS else _uses_interface
    found = [module for module in modules if fits(module)]
    if kind not in ADAPTERS and reason is None:
        reason = _misfit(found, getattr(model.config, "num_hidden_layers", len(found)))
    if reason is not None:
        raise ValueError(f"model_type={kind}: lm_infinite does not fit it ({reason})")
    if not found:
        raise ValueError(
            f"model_type={kind}: its attention does not go through transformers' attention interface with rotary "
            "position embeddings, and lm_infinite has no adapter for it"
        )
    if all(own_window(module) is not None for module in found):
        raise ValueError(
            f"model_type={kind}: every layer has a sliding window of its own; set sliding_window to null in config.json"
        )
    return found


def trained_context(model: Any) -> int | None:
    """Tokens of the context that the model was trained on, as far as its config says."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((length for name in names if isinstance(length := getattr(model.config, name, None), int)), None)


def refuse_what_it_cannot(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before each call of the model: what would be computed otherwise than it is asked for is refused."""
    chosen = module.config._attn_implementation
    if chosen not in (NAME, whole_rows.NAME):
        raise ValueError(
            f"attn_implementation={chosen}: {NAME} is in force, whose keys are not rotated; undo() it first"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(
            f"output_attentions=True: {NAME} never forms the n x n weights; undo() it, then attn_implementation=eager"
        )
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    if call.get("past_key_values") is not None and call.get("use_cache") is False:
        # `generate` would feed it all tokens so far at every step; MPT's config has use_cache=False.
        raise ValueError(
            "use_cache=False with past_key_values: the cache would get each token many times; set it to True"
        )
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if positions is None or positions.shape[-1] == 1:
        return
    jumps = positions.diff(dim=-1) != 1
    if isinstance(mask, Tensor) and mask.dim() == 2:
        is_token = mask[:, -positions.shape[-1] :].bool()
        jumps = jumps & is_token[:, 1:] & is_token[:, :-1]
    if bool(jumps.any()):
        raise ValueError(f"position_ids that jump (packed documents): {NAME} takes one stream a row")


def _misfit(found: list[Any], num_layers: int) -> str | None:
    """What would make wrong numbers of these attention modules; None for nothing."""
    if any(_rotates_under_a_condition(type(module)) for module in found):
        return "it rotates under a condition, so that layers may be without positions"
    if found and sorted(module.layer_idx for module in found) != list(range(num_layers)):
        return f"{len(found)} of its {num_layers} layers have attention, and others a state of their own"
    return None


def _rotates_under_a_condition(kind: type) -> bool:
    """Whether `forward` applies its rotation within an `if`: what it skips, we would rotate."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))  # type: ignore[attr-defined]
    guarded = (node for outer in ast.walk(tree) if isinstance(outer, ast.If) for node in ast.walk(outer))
    calls = (node.func for node in guarded if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "apply_rotary_pos_emb" for function in calls)


def _is_numbered(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx")


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    is_rotary = "position_embeddings" in inspect.signature(forward).parameters
    return _is_numbered(module) and is_rotary and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names
