"""Installation of the rotary module: discovery, refusals, and unchanged state."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from clex_train.rope.patch import install_rotary, require_rotary
from clex_train.rope.rotary import ScaledRotary
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gpt2", "learned absolute positions"), ("bloom", "ALiBi"), ("gptj", "table of sines"), ("mamba", "no module")],
)
def test_a_model_without_rotary_module_is_refused_by_name_and_reason(kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"model_type={kind}: no rotary position embedding .*{reason}"):
        require_rotary(AutoConfig.for_model(kind))


def test_falcon_with_alibi_does_not_use_its_rotary_module() -> None:
    require_rotary(AutoConfig.for_model("falcon", alibi=False))
    with pytest.raises(ValueError, match=r"model_type=falcon: no rotary position embedding .*ALiBi"):
        require_rotary(AutoConfig.for_model("falcon", alibi=True))


def test_an_encoder_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="model_type=t5: cannot build a causal language model") as refusal:
        require_rotary(AutoConfig.for_model("t5"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [LlamaConfig(num_hidden_layers=80), GPTNeoXConfig()])
def test_an_architecture_of_any_size_is_checked_without_weights(config: LlamaConfig) -> None:
    require_rotary(config)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@torch.no_grad()
def test_a_table_starts_at_the_static_scaling_of_the_model(scaling: dict[str, object]) -> None:
    model, ids = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **scaling}), tokens(2, CONTEXT)
    before = model(ids).logits
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    assert torch.allclose(model(ids).logits, before, atol=1e-5, rtol=0)


def test_frequencies_rounded_to_bfloat16_are_recomputed_from_the_config() -> None:
    exact = install_rotary(tiny_model("llama"), CONTEXT).base_inv_freq
    model = tiny_model("llama")
    model.bfloat16()
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(install_rotary(model, CONTEXT).base_inv_freq, exact)


def test_casting_the_patched_model_does_not_round_its_frequencies() -> None:
    model, ids = tiny_model("llama"), tokens(1, CONTEXT)
    handle = install_rotary(model, CONTEXT)
    exact, _ = handle.rotary(torch.zeros(1, 1, 1), torch.arange(1000)[None])
    model.bfloat16()
    model(ids)
    assert torch.equal(handle.rotary(torch.zeros(1, 1, 1), torch.arange(1000)[None])[0], exact)


def test_a_model_on_the_meta_device_gets_real_frequencies() -> None:
    config = tiny_model("gpt_neox").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    handle = install_rotary(model, CONTEXT)
    assert torch.equal(handle.base_inv_freq, install_rotary(tiny_model("gpt_neox"), CONTEXT).base_inv_freq)


def test_the_state_dict_has_the_same_keys_as_before() -> None:
    model = tiny_model("gpt_neox")
    before = list(model.state_dict())
    install_rotary(model, CONTEXT)
    assert list(model.state_dict()) == before


def test_a_second_installation_is_refused_until_the_first_is_undone() -> None:
    model = tiny_model("llama")
    handle = install_rotary(model, CONTEXT)
    with pytest.raises(ValueError, match="already applied"):
        install_rotary(model, CONTEXT)
    handle.undo()
    install_rotary(model, CONTEXT)


def test_undo_in_the_middle_of_a_context_leaves_no_hook() -> None:
    model = tiny_model("llama")
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    handle = install_rotary(model, CONTEXT)
    with handle.training(Spectrum(handle.base_inv_freq)):
        handle.undo()
    assert {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert not any(isinstance(m, ScaledRotary) for m in model.modules())


@torch.no_grad()
def test_a_deep_copy_of_the_model_has_an_independent_handle() -> None:
    model, ids = tiny_model("llama"), tokens(1, CONTEXT + 4)
    handle = install_rotary(model, CONTEXT)
    clone = copy.deepcopy(model)
    plain = clone(ids).logits
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    assert not torch.allclose(model(ids).logits, plain)
    assert torch.equal(clone(ids).logits, plain)


def test_a_sequence_beyond_t_max_is_refused_with_n_t_max_and_l() -> None:
    model = tiny_model("llama")
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(3.0)))
    model(tokens(1, 3 * CONTEXT))
    with pytest.raises(ValueError, match=r"num_tokens=49: beyond t_max \* L = 3 \* 16"):
        model(tokens(1, 3 * CONTEXT + 1))


@torch.no_grad()
def test_clamping_uses_t_max_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model("llama"), tokens(1, 60)
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(3.0)), clamp=True)
    with caplog.at_level(logging.WARNING):
        clamped = model(ids).logits
        model(ids)
    assert [record.getMessage() for record in caplog.records] == [
        "num_tokens=60 exceeds t_max * L = 3 * 16: t stays at t_max, and quality will degrade"
    ]
    with handle.pinned(3.0):
        assert torch.equal(model(ids).logits, clamped)


def test_a_table_of_another_rotary_dimension_is_refused_with_both() -> None:
    handle = install_rotary(tiny_model("gpt_neox"), CONTEXT)
    table = FrequencyTable(torch.ones(1).double(), torch.ones(1, 5).double())
    with pytest.raises(ValueError, match=r"rotary dimension 10\): the model rotates 3 pairs \(rotary dimension 6\)"):
        handle.use(table)


def test_a_table_for_another_context_length_is_refused_with_both() -> None:
    handle = install_rotary(tiny_model("llama"), CONTEXT)
    table = FrequencyTable(torch.ones(1).double(), handle.base_inv_freq[None], context_len=4096)
    with pytest.raises(ValueError, match="table for context_len=4096: the model's handle has 16"):
        handle.use(table)


def test_pinning_needs_a_table_and_a_member_of_its_grid() -> None:
    handle = install_rotary(tiny_model("llama"), CONTEXT)
    with pytest.raises(ValueError, match=r"t=2: no frequency table"), handle.pinned(2.0):
        pass
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(3.0)))
    with pytest.raises(ValueError, match=r"t=2\.5: not on the table's grid"), handle.pinned(2.5):
        pass


def test_sampled_positions_must_fit_the_batch_and_be_exact() -> None:
    model, ids = tiny_model("llama"), tokens(2, 8)
    handle = install_rotary(model, CONTEXT)
    spectrum = Spectrum(handle.base_inv_freq)
    with (
        pytest.raises(ValueError, match=r"positions of shape \(2, 9\): the batch has 2 rows of 8 tokens"),
        handle.training(spectrum, torch.zeros(2, 9, dtype=torch.float64)),
    ):
        model(ids)
    with pytest.raises(ValueError, match=r"positions of torch\.float32"), handle.training(spectrum, torch.zeros(2, 8)):
        pass
    with pytest.raises(ValueError, match=r"position_ids of torch\.float32"):
        model(ids, position_ids=torch.arange(8.0)[None])


def test_negative_positions_are_refused() -> None:
    model, ids = tiny_model("llama"), tokens(1, 4)
    handle = install_rotary(model, CONTEXT)
    with pytest.raises(ValueError, match="position_ids=-2: positions start at 0; give padding position 0"):
        model(ids, position_ids=torch.arange(-2, 2)[None])
    for number in (-1.0, float("nan"), float("inf")):
        with (
            pytest.raises(ValueError, match="sampled positions must be finite"),
            handle.training(Spectrum(handle.base_inv_freq), torch.tensor([[0.0, number]]).double()),
        ):
            pass


@pytest.mark.parametrize("t", [0.5, -1.0, float("nan")])
def test_a_scale_factor_below_one_is_refused(t: float) -> None:
    handle = install_rotary(tiny_model("llama"), CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(3.0)))
    with pytest.raises(ValueError, match=f"t={t:g}"), handle.pinned(t):
        pass


def test_frequencies_of_another_rotary_dimension_cannot_be_trained() -> None:
    handle = install_rotary(tiny_model("llama"), CONTEXT)
    with (
        pytest.raises(ValueError, match="inv_freq of 2 pairs: the model rotates 6"),
        handle.training(Spectrum(torch.ones(2).double())),
    ):
        pass


def test_a_training_row_cannot_continue_from_a_cache() -> None:
    model = tiny_model("llama")
    handle = install_rotary(model, CONTEXT)
    cache = model(tokens(1, 8), use_cache=True).past_key_values
    with (
        handle.training(Spectrum(handle.base_inv_freq)),
        pytest.raises(ValueError, match="the KV cache holds 8 keys"),
    ):
        model(tokens(1, 8), past_key_values=cache)


@torch.no_grad()
def test_contexts_nest_and_restore_even_after_an_error() -> None:
    model, ids = tiny_model("llama"), tokens(1, CONTEXT)
    handle = install_rotary(model, CONTEXT)
    table = ntk_table(handle.base_inv_freq, scale_grid(4.0))
    handle.use(table)
    at_one = model(ids).logits
    with handle.pinned(4.0):
        at_four = model(ids).logits
        with pytest.raises(ValueError, match="batch has"), handle.training(table.at(2.0), torch.zeros(9, 9).double()):
            model(ids)
        assert torch.equal(model(ids).logits, at_four)
    assert torch.equal(model(ids).logits, at_one)


@torch.no_grad()
def test_plain_positions_in_training_are_the_positions_of_evaluation() -> None:
    model, ids = tiny_model("llama"), tokens(2, 2 * CONTEXT)
    handle = install_rotary(model, CONTEXT)
    table = ntk_table(handle.base_inv_freq, scale_grid(4.0))
    handle.use(table)
    expected = model(ids).logits
    for positions in (None, torch.arange(2 * CONTEXT).expand(2, -1)):
        with handle.training(table.at(2.0), positions):
            assert torch.allclose(model(ids).logits, expected, atol=1e-6)


@torch.no_grad()
def test_local_layers_keep_their_own_rope_in_training() -> None:
    model, ids = tiny_model("gemma3_text", layer_types=["sliding_attention"] * 2), tokens(1, CONTEXT)
    with pytest.raises(ValueError, match="exactly one must be global"):
        install_rotary(model, CONTEXT)
    model = tiny_model("gemma3_text", num_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    handle, seen = install_rotary(model, CONTEXT), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    model(ids)
    with handle.training(Spectrum(handle.base_inv_freq / 3), 3.0 * torch.arange(CONTEXT).double()[None]):
        model(ids)
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(seen[1], seen[4])


def test_cos_and_sin_are_exact_at_a_million_positions() -> None:
    handle = install_rotary(tiny_model("llama"), CONTEXT)
    positions = torch.tensor([[0, 1, 65_537, 2**20 - 1, 2**20]])
    cos, sin = handle.rotary(torch.zeros(1, 5, 1), positions)
    angle = (positions[..., None].double() * handle.base_inv_freq).repeat(1, 1, 2)
    assert torch.allclose(cos.double(), angle.cos(), atol=1e-6, rtol=0)
    assert torch.allclose(sin.double(), angle.sin(), atol=1e-6, rtol=0)
