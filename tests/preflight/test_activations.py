"""Activation counts on the meta device, against real passes and a published formula."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen3Config

from clex_train.config.engine import EngineConfig
from clex_train.engine import token_loss
from clex_train.models import memory_options
from clex_train.models.memory_options import recompute_layers
from clex_train.preflight import meta_model
from clex_train.preflight.activations import Footprint, measure
from clex_train.rope.patch import install_rotary
from clex_train.scaling.spectrum import Spectrum

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SMALL)
ROWS, TOKENS = 4, 128


def count_in_real_pass(
    arch, dtype: torch.dtype, *, checkpointing: bool, attention: str = "sdpa", **options: Any
) -> Footprint:
    """Count over a real forward and backward pass on the CPU, with trainable frequencies."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(arch), dtype=dtype, attn_implementation=attention).train()
    engine = EngineConfig(activation_checkpointing=checkpointing, **options)
    if checkpointing:
        recompute_layers(model)
    memory_options.install(model, engine)
    handle = install_rotary(model, TOKENS)
    leaf = handle.base_inv_freq.requires_grad_()
    positions = torch.arange(TOKENS, dtype=torch.float64).expand(ROWS, TOKENS).contiguous()
    with handle.training(Spectrum(leaf), positions):
        counted = measure(model, torch.randint(0, 512, (ROWS, TOKENS)), token_loss.choose_loss(engine))
    assert leaf.grad is not None
    assert all(p.grad is None for p in model.parameters())
    return counted


def count_on_meta(
    arch,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    attention: str = "sdpa",
    learns: bool = True,
    **options: Any,
) -> Footprint:
    return meta_model.footprint(
        arch,
        rows=ROWS,
        tokens=TOKENS,
        dtype=dtype,
        attention=attention,
        engine=EngineConfig(activation_checkpointing=checkpointing, **options),
        learns_frequencies=learns,
    )


def assert_close(meta: Footprint, real: Footprint, tolerance: float) -> None:
    assert meta.activations == pytest.approx(real.activations, rel=tolerance)
    assert meta.logits == pytest.approx(real.logits, rel=tolerance)
    assert meta.layers == pytest.approx(real.layers, rel=tolerance)


@pytest.mark.parametrize(
    ("arch", "dtype", "checkpointing"),
    [
        (LLAMA, torch.float32, False),
        (LLAMA, torch.bfloat16, True),
        (Qwen3Config(**SMALL, head_dim=16), torch.bfloat16, False),
        (MixtralConfig(**SMALL, num_local_experts=4), torch.bfloat16, True),
        (MixtralConfig(**SMALL, num_local_experts=4), torch.float32, False),
    ],
)
def test_a_pass_on_the_meta_device_matches_a_real_pass(arch, dtype, checkpointing):
    meta = count_on_meta(arch, dtype, checkpointing=checkpointing)
    # With experts, a CPU saves a few more small index tensors.
    tolerance = 0.04 if arch.model_type == "mixtral" else 0.005
    assert_close(meta, count_in_real_pass(arch, dtype, checkpointing=checkpointing), tolerance)


def test_a_fused_query_key_value_product_is_within_a_tenth():
    arch = GPTNeoXConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    )
    # PyTorch's CPU kernel copies the strided values of GPT-NeoX; flash kernels on a GPU read them in place.
    assert_close(
        count_on_meta(arch, torch.bfloat16, checkpointing=False),
        count_in_real_pass(arch, torch.bfloat16, checkpointing=False),
        0.1,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{"tiled_loss": 64}, {"tiled_mlp": 64}, {"tiled_loss": 100, "tiled_mlp": 100}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiled_pass_on_the_meta_device_matches_a_real_pass(options, checkpointing, dtype):
    meta = count_on_meta(LLAMA, dtype, checkpointing=checkpointing, **options)
    assert_close(meta, count_in_real_pass(LLAMA, dtype, checkpointing=checkpointing, **options), 0.005)
    whole = count_on_meta(LLAMA, dtype, checkpointing=checkpointing)
    assert ("tiled_loss" in options) == (meta.logits < whole.logits / 2)
    assert ("tiled_mlp" in options) == (meta.layers < whole.layers)


def test_offloaded_inputs_are_counted_on_the_host():
    kept = count_on_meta(LLAMA, torch.bfloat16, checkpointing=True)
    moved = count_on_meta(LLAMA, torch.bfloat16, checkpointing=True, offload_activations=True)
    inputs = LLAMA.num_hidden_layers * ROWS * TOKENS * 2 * LLAMA.hidden_size
    assert moved.host == inputs
    assert kept.activations - moved.activations == inputs
    assert kept.host == 0
    deep = copy.deepcopy(LLAMA)
    deep.num_hidden_layers = 9
    assert count_on_meta(deep, torch.bfloat16, checkpointing=True, offload_activations=True).host == 3 * inputs


def test_eager_attention_counts_the_full_score_matrix_on_meta_as_in_a_real_pass():
    meta = count_on_meta(LLAMA, torch.float32, checkpointing=False, attention="eager")
    assert_close(meta, count_in_real_pass(LLAMA, torch.float32, checkpointing=False, attention="eager"), 0.01)
    scores = ROWS * 8 * TOKENS * TOKENS * 4
    assert meta.activations - count_on_meta(LLAMA, torch.float32, checkpointing=False).activations > 3 * scores


@pytest.mark.parametrize("checkpointing", [False, True])
def test_extrapolation_to_more_layers_is_exact(checkpointing):
    deep = copy.deepcopy(LLAMA)
    deep.num_hidden_layers = 7
    extended = count_on_meta(deep, torch.bfloat16, checkpointing=checkpointing)
    # If layer types differ, every layer is measured.
    deep.layer_types = ["full_attention"] * 6 + ["other"]
    measured = count_on_meta(deep, torch.bfloat16, checkpointing=checkpointing)
    assert_close(extended, measured, 1e-4)


@pytest.mark.parametrize("learns", [False, True])
def test_a_llama_layer_matches_the_formula(learns):
    """Follow Korthikanti et al., arXiv 2205.05198, section 4, for RMSNorm, SwiGLU, GQA and flash attention."""
    hidden, queries, keys, inner, heads, head_dim = 128, 128, 32, 256, 8, 16
    norms = 2 * (4 * hidden + 4 + 2 * hidden + 2 * hidden)  # float32 copy, its scale, normalised, times the weight
    attention = 2 * (queries + keys + keys + queries) + 4 * heads  # q, k, v, output, log-sum-exp
    swiglu = 4 * 2 * inner  # gate, its activation, up, their product
    rotation = (2 * 2 * (queries + keys) if learns else 0) + 2 * 2 * head_dim  # q, k and their halves; cos, sin
    if not learns:
        rotation = 0  # cos and sin in bfloat16: one pair for all layers
    two, three = copy.deepcopy(LLAMA), copy.deepcopy(LLAMA)
    two.num_hidden_layers = 2
    counted = (
        count_on_meta(three, torch.bfloat16, checkpointing=False, learns=learns).activations
        - count_on_meta(two, torch.bfloat16, checkpointing=False, learns=learns).activations
    )
    assert counted == ROWS * TOKENS * (norms + attention + swiglu + rotation)


def test_recomputed_layers_save_only_their_input_and_cos_and_sin():
    two, three = copy.deepcopy(LLAMA), copy.deepcopy(LLAMA)
    two.num_hidden_layers = 2
    counted = (
        count_on_meta(three, torch.bfloat16, checkpointing=True).activations
        - count_on_meta(two, torch.bfloat16, checkpointing=True).activations
    )
    # Depending on the version of torch and transformers, layers share cos and sin or have copies.
    own, shared = ROWS * TOKENS * 2 * 128, ROWS * TOKENS * 2 * 2 * 16
    assert counted in (own, own + shared)


def test_logits_take_two_copies_in_their_dtype_and_three_in_float32():
    """Count the loss of transformers: logits in bfloat16 and float32, log-softmax, its gradient, that of the logits."""
    wide = copy.deepcopy(LLAMA)
    wide.vocab_size = 50_000
    counted = count_on_meta(wide, torch.bfloat16, checkpointing=True).logits
    assert counted == pytest.approx(ROWS * TOKENS * 50_000 * 12, rel=0.05)


def test_measuring_does_not_change_the_model():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, **_: object) -> object:
            return type("Output", (), {"logits": self.head(self.body(input_ids))})()

    model = Tiny()
    measure(model, torch.zeros(1, 3, dtype=torch.int64))
    assert not model.head._forward_pre_hooks
    model(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()
    assert model.head.weight.grad is not None
