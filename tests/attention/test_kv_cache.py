"""KV cache lookup: found by type under any name; a call that hides its cache is an error."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from clex_train.attention import kv_cache
from clex_train.attention.kv_cache import LibraryChanged
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.rope.patch import install_rotary
from clex_train.scaling.methods.ntk import ntk_table


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


@pytest.mark.parametrize("name", ["cache", "past_key_values", "a_name_of_tomorrow"])
def test_a_cache_is_found_under_any_name_and_by_position(name: str) -> None:
    cache = DynamicCache()
    assert kv_cache.find_in_call((torch.ones(1),), {"use_cache": True, name: cache}) is cache
    assert kv_cache.find_in_call((torch.ones(1), None, cache), {}) is cache
    assert kv_cache.find_in_call((torch.ones(1), None), {name: None}) is None


def test_a_cache_is_found_in_every_form_of_output() -> None:
    cache, logits = DynamicCache(), torch.ones(1)
    name = kv_cache.parameter_name(llama())
    forms = [
        (logits, cache),
        CausalLMOutputWithPast(logits=logits, **{name: cache}),
        {"logits": logits, "anything": cache},
        SimpleNamespace(logits=logits, anything=cache),
    ]
    assert all(kv_cache.require_in_output(form) is cache for form in forms)
    with pytest.raises(LibraryChanged, match=r"holds no KV cache; transformers [0-9.]+ is installed, [0-9.]+ is"):
        kv_cache.require_in_output((logits,))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "falcon", "mpt", "bloom", "opt", "codegen"])
def test_a_cache_passed_in_is_the_one_returned(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    assert kv_cache.accepts_keys(model)
    tiny = llama()
    cache = DynamicCache()
    with torch.no_grad():
        output = tiny(torch.ones(1, 3, dtype=torch.int64), use_cache=True, **kv_cache.as_kwargs(tiny, cache))
    assert kv_cache.require_in_output(output) is cache
    assert cache.get_seq_length() == 3


def test_the_signature_of_a_class_is_inspected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = llama(), DynamicCache()
    first = kv_cache.as_kwargs(model, cache)
    monkeypatch.setattr("inspect.signature", None)
    assert kv_cache.as_kwargs(llama(), cache) == first


def test_a_recurrent_state_is_not_a_kv_cache() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", num_hidden_layers=1))
    assert not kv_cache.accepts_keys(model)


def test_a_model_without_a_cache_argument_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="model_type=Linear: its forward takes no KV cache"):
        kv_cache.as_kwargs(nn.Linear(1, 1), DynamicCache())


class Hidden:
    """Carry a cache in an object of unknown type, as a later version of a library might."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache


def hide_cache(model: LlamaForCausalLM, inner: nn.Module) -> None:
    """Wrap the cache that `inner` receives in an object, and unwrap it in its forward."""
    name, forward = kv_cache.parameter_name(model), inner.forward

    def hiding(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, name: Hidden(kwargs[name])} if kwargs.get(name) is not None else kwargs

    def finding(*args: Any, **kwargs: Any) -> Any:
        held = kwargs.get(name)
        return forward(*args, **{**kwargs, name: held.cache if isinstance(held, Hidden) else held})

    inner.forward = finding  # type: ignore[method-assign]
    inner.register_forward_pre_hook(hiding, with_kwargs=True, prepend=True)


@torch.no_grad()
def test_a_cache_returned_but_never_passed_in_is_an_error_with_both_versions() -> None:
    model, ids = llama(), torch.ones(1, 17, dtype=torch.int64)
    handle = install_rotary(model, 16)
    handle.use(ntk_table(handle.base_inv_freq, [1.0, 2.0]))
    hide_cache(model, model.model)
    cache = kv_cache.require_in_output(model(ids[:, :16], use_cache=True))
    with pytest.raises(LibraryChanged, match=r"returned a KV cache of 17, but none .* installed, .* newest tested"):
        model(ids[:, 16:], use_cache=True, **kv_cache.as_kwargs(model, cache))


@torch.no_grad()
def test_lm_infinite_detects_keys_of_a_cache_it_did_not_receive() -> None:
    model, ids = llama(), torch.ones(1, 17, dtype=torch.int64)
    apply_lm_infinite(model, 8, 2)
    cache = DynamicCache()
    model(ids[:, :16], use_cache=True, **kv_cache.as_kwargs(model, cache))
    hide_cache(model, model.model.layers[0].self_attn)
    with pytest.raises(LibraryChanged, match="attends to keys of a KV cache"):
        model(ids[:, 16:], use_cache=True, **kv_cache.as_kwargs(model, cache))


@torch.no_grad()
def test_a_decoder_that_takes_tokens_by_another_name_is_an_error() -> None:
    model = llama()
    install_rotary(model, 16)
    forward = model.model.forward

    def renamed(tokens: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(input_ids=tokens, **kwargs)

    model.model.forward = renamed
    with pytest.raises(LibraryChanged, match="takes its tokens under names other than"):
        model.model(tokens=torch.ones(1, 3, dtype=torch.int64))
