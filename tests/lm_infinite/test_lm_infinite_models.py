"""LM-Infinite on models of transformers: plain attention within the window, the definition beyond it, clean undo."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.lm_infinite.middle_tokens import WholeMiddle
from clex_train.utils.errors import ConfigError
from tests.rope.rotary_families import FAMILIES, ONE_ATTENTION, WITHOUT_LM_INFINITE, tiny_model, tokens

# Falcon has custom attention (test_adapters.py); the others use the interface of transformers.
INTERFACE_FAMILIES = sorted(set(FAMILIES) - WITHOUT_LM_INFINITE - {"falcon"})


@pytest.fixture(scope="module")
def original(complete_goldens):
    settings = json.loads((complete_goldens / "lmi_llama.config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("rope_scaling", "rope_theta")}
    config = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(complete_goldens / "lmi_llama.weights.safetensors"))
    return model, load_file(complete_goldens / "lmi_eval.safetensors")


@pytest.mark.parametrize(
    ("key", "n", "n_local", "n_global"),
    [(f"lambda.{n}", n, 64, 10) for n in (64, 65, 128, 300)]
    + [("lambda.L32.G4.300", 300, 32, 4), ("lambda.L64.G0.300", 300, 64, 0), ("lambda.L64.G100.300", 300, 64, 100)],
)
def test_logits_match_the_original_code(original, key, n, n_local, n_global):
    model, stored = original
    expected = stored[f"{key}.logits"]
    rows = torch.arange(n) if len(expected) == n else stored[f"rows.{n}"]
    handle = apply_lm_infinite(model, n_local, n_global, block_len=48)
    with torch.no_grad():
        logits = model(stored["input_ids"][None, :n]).logits[0]
    handle.undo()
    torch.testing.assert_close(logits[rows], expected, rtol=0, atol=1e-4)


def test_limiting_only_the_distance_matches_the_original_code(original):
    model, stored = original
    expected = stored["limitonly.128.logits"]
    handle = apply_lm_infinite(model, 64, 0, block_len=48, middle=WholeMiddle())
    with torch.no_grad():
        logits = model(stored["input_ids"][None, :128]).logits[0]
    handle.undo()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 0, "atol": 1e-6}), (torch.float32, {"rtol": 1e-5, "atol": 2e-6})],
    ids=str,
)
@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_results_are_unchanged_within_the_window(family, dtype, tolerance):
    model = tiny_model(family, dtype=dtype)
    model.set_experts_implementation("eager")
    ids = tokens(2, 24)
    with torch.no_grad():
        plain = model(ids).logits
        handle = apply_lm_infinite(model, 24, 4, block_len=7)
        within = model(ids).logits
        handle.undo()
        again = model(ids).logits
    torch.testing.assert_close(within, plain, **tolerance)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_blocks_and_caches_do_not_change_results_beyond_the_window(family):
    """Compare one forward in float64 with other block lengths, and with a constant cache fed by 1, 5, 17, ... tokens.

    The tolerance is 1e-6 because cos and sin are float32 in every dtype, at other positions of equal distance.
    """
    model = tiny_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    ids = tokens(2, 40)
    with torch.no_grad():
        handle = apply_lm_infinite(model, 12, 3, block_len=64)
        whole = model(ids).logits
        handle.undo()
        handle = apply_lm_infinite(model, 12, 3, block_len=7)
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-6)
        cache = handle.new_cache()
        pieces = ids.split([1, 5, 17, 1, 14, 2], dim=1)
        outputs = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", sorted(WITHOUT_LM_INFINITE))
def test_a_family_that_the_mask_does_not_fit_is_refused_in_one_line(family):
    model = tiny_model(family)
    with pytest.raises(ConfigError, match=f"^model_type={family}: lm_infinite does not support it") as refused:
        apply_lm_infinite(model, 12, 3)
    assert "\n" not in str(refused.value)


FULL = {"layer_types": ["full_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        # Ministral 3 multiplies queries by a temperature of their true position, which differs between the two calls.
        *((f, ONE_ATTENTION.get(f, {})) for f in INTERFACE_FAMILIES if f != "ministral3"),
        pytest.param("llama", {"rope_parameters": YARN}, id="llama-yarn, whose cos and sin have a factor"),
    ],
)
def test_a_layer_beyond_the_window_is_plain_attention_over_visible_tokens(family, settings):
    """Use one layer, which only sees embeddings, so that the plain model can get G starting tokens at distance L."""
    n_local, n_global, num_tokens = 12, 3, 30
    model = tiny_model(family, num_layers=1, dtype=torch.float64, **settings)
    model.set_experts_implementation("eager")
    ids = tokens(2, num_tokens)
    seen = torch.cat((ids[:, :n_global], ids[:, -n_local:]), dim=1)
    positions = torch.cat((torch.zeros(n_global, dtype=torch.int64), torch.arange(1, n_local + 1)))
    with torch.no_grad():
        plain = model(seen, position_ids=positions.expand(2, -1), attention_mask=torch.ones_like(seen)).logits
        apply_lm_infinite(model, n_local, n_global, block_len=8)
        ours = model(ids).logits
    torch.testing.assert_close(ours[:, -1], plain[:, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_matches_the_row_alone(family, side):
    model = tiny_model(family, dtype=torch.float64)
    apply_lm_infinite(model, 8, 3, block_len=5)
    lengths, num_tokens = (30, 13, 4), 30
    ids, mask = tokens(3, num_tokens), torch.zeros(3, num_tokens, dtype=torch.int64)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            mask[row, -length:] = 1
            if side == "right":
                mask[row] = mask[row].flip(0)
        together = model(ids, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(together[row][real], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_continues_from_its_cache(side):
    """Put padding before a row, and within it between the prompt and its continuation."""
    model = tiny_model("llama", dtype=torch.float64)
    handle = apply_lm_infinite(model, 8, 3, block_len=5)
    lengths, ids = (20, 11, 2), tokens(3, 44)
    mask = torch.ones(3, 44, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start, stop = (0, 20 - length) if side == "left" else (length, 20)
        mask[row, start:stop] = 0
    cache, outputs, seen = handle.new_cache(), [], 0
    with torch.no_grad():
        for size in (20, 1, 1, 9, 1, 12):
            piece, seen = ids[:, seen : seen + size], seen + size
            call = {"attention_mask": mask[:, :seen], "past_key_values": cache, "use_cache": True}
            outputs.append(model(piece, **call).logits)
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(torch.cat(outputs, dim=1)[row][real], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_equal_with_a_constant_a_full_and_no_cache(beams):
    model = tiny_model("mistral", dtype=torch.float64)
    handle = apply_lm_infinite(model, 8, 3)
    ids = tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    constant = model.generate(ids, past_key_values=handle.new_cache(), **settings)
    assert torch.equal(constant, model.generate(ids, **settings))
    assert torch.equal(constant, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("source", ["from_config", "from_pretrained"])
def test_transformers_accepts_the_name_of_the_interface_before_sizes_are_set(source, tmp_path):
    """Compare `attn_implementation="lm_infinite"` with applying it to a model of another back end."""
    stock, ids = tiny_model("llama"), tokens(1, 40)
    if source == "from_config":
        model = AutoModelForCausalLM.from_config(stock.config, attn_implementation="lm_infinite").eval()
        model.load_state_dict(stock.state_dict())
    else:
        stock.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lm_infinite").eval()
    with pytest.raises(ValueError, match="call apply_lm_infinite"):
        model(ids)
    apply_lm_infinite(model, 8, 2)
    apply_lm_infinite(stock, 8, 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_the_cache_does_not_grow_and_is_independent_of_the_stream_position():
    model = tiny_model("llama")
    handle = apply_lm_infinite(model, 16, 4)
    ids, sizes, results = tokens(1, 200), [], []
    for shift in (0, 10**8):
        cache = handle.new_cache()
        with torch.no_grad():
            model(ids[:, :60], past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                layer.num_tokens += shift
            logits = []
            for piece in ids[:, 60:].split(7, dim=1):
                logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
                held = [x for layer in cache.layers for x in (*vars(layer).values(), *layer.start)]
                sizes.append(sum(x.numel() for x in held if isinstance(x, torch.Tensor)))
        assert cache.get_seq_length() == shift + 200
        results.append(torch.cat(logits, dim=1))
    assert len(set(sizes)) == 1
    assert torch.equal(*results)


def test_gradients_match_plain_attention_within_the_window():
    model = tiny_model("llama", dtype=torch.float64).train()
    ids, gradients = tokens(2, 20), []
    for n_local in (None, 20):
        handle = None if n_local is None else apply_lm_infinite(model, n_local, 2, block_len=6)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        if handle is not None:
            handle.undo()
    for ours, plain in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_recomputed_layers_have_the_same_gradients():
    model = tiny_model("gemma2", dtype=torch.float64).train()
    apply_lm_infinite(model, 8, 2, block_len=6)
    ids, gradients = tokens(2, 30), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


def test_a_copy_of_a_model_is_independent():
    model = tiny_model("llama")
    handle = apply_lm_infinite(model, 8, 2)
    ids = tokens(1, 30)
    with torch.no_grad():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids).logits, expected)
    handle.undo()


@pytest.mark.parametrize("family", ["llama", "gptj", "mpt", "bloom"])
def test_a_model_that_was_used_in_inference_mode_trains(family):
    model = tiny_model("llama") if family == "llama" else small_adapted(family)
    apply_lm_infinite(model, 8, 2, block_len=8)
    ids = tokens(1, 40)
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    trained = model(ids, labels=ids).loss
    trained.backward()
    assert float(trained.detach()) == pytest.approx(loss, abs=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


def small_adapted(kind: str) -> torch.nn.Module:
    sizes = {
        "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes[kind], vocab_size=256)).eval()


class TestRefusals:
    """Refusals, in one line that names the reason."""

    def test_sizes_out_of_range(self):
        with pytest.raises(ValueError, match="n_local=0"):
            apply_lm_infinite(tiny_model("llama"), 0, 4)

    def test_unusual_sizes_give_a_warning(self, caplog):
        model = tiny_model("llama")
        with caplog.at_level(logging.WARNING):
            apply_lm_infinite(model, 17, 17).undo()
        assert "n_local=17 exceeds the model's trained context of 16 tokens" in caplog.text
        assert "n_global=17 is not below n_local=17" in caplog.text

    @pytest.mark.parametrize("kind", ["gpt2", "codegen"])
    def test_models_without_the_interface_or_without_rotation_are_refused_by_name(self, kind):
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 31}
        rotary = {"rotary_dim": 8} if kind == "codegen" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **rotary))
        with pytest.raises(ValueError, match=f"model_type={kind}"):
            apply_lm_infinite(model, 8, 2)

    def test_attention_weights(self):
        model = tiny_model("llama")
        apply_lm_infinite(model, 8, 2)
        with pytest.raises(ValueError, match="output_attentions"):
            model(tokens(1, 4), output_attentions=True)

    @pytest.mark.parametrize("kind", ["smollm3", "exaone4"])
    def test_models_with_layers_without_positions(self, kind):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
        config = AutoConfig.for_model(kind, **sizes, num_hidden_layers=4, vocab_size=31, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match=f"model_type={kind}: .*layers 3 have no positions"):
            apply_lm_infinite(model, 8, 2)

    def test_models_with_layers_that_are_not_attention(self):
        config = AutoConfig.for_model(
            "lfm2", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
            num_hidden_layers=3, vocab_size=31, layer_types=["conv", "full_attention", "conv"],
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"model_type=lfm2: .*1 of its 3 layers"):
            apply_lm_infinite(AutoModelForCausalLM.from_config(config), 8, 2)

    @pytest.mark.parametrize("constant", [False, True])
    def test_masks_of_four_dimensions(self, constant):
        model = tiny_model("llama")
        handle = apply_lm_infinite(model, 8, 2)
        mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        cache = {"past_key_values": handle.new_cache()} if constant else {}
        with pytest.raises(ValueError, match="attention_mask of 4 dimensions"):
            model(tokens(1, 20), attention_mask=mask, **cache)

    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_documents_by_position_or_with_a_mask(self, masked):
        model, jumping = tiny_model("llama"), torch.tensor([[0, 1, 0, 1]])
        apply_lm_infinite(model, 8, 2)
        with pytest.raises(ValueError, match="packed documents"):
            model(tokens(1, 4), torch.ones(1, 4, dtype=torch.int64) if masked else None, jumping)

    def test_positions_of_padding_are_not_packed_documents(self):
        model = tiny_model("llama")
        apply_lm_infinite(model, 8, 2)
        with torch.no_grad():
            model(tokens(1, 4), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 1]]))

    def test_packed_documents(self):
        model = tiny_model("llama")
        apply_lm_infinite(model, 8, 2)
        with pytest.raises(ValueError, match="packed documents"):
            model(tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))

    def test_cropping_a_constant_cache(self):
        model = tiny_model("llama")
        cache = apply_lm_infinite(model, 8, 2).new_cache()
        with torch.no_grad():
            model(tokens(1, 20), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="LambdaCache"):
            cache.crop(-3)

    def test_a_second_application(self):
        model = tiny_model("llama")
        apply_lm_infinite(model, 8, 2)
        with pytest.raises(ValueError, match="undo"):
            apply_lm_infinite(model, 8, 2)
