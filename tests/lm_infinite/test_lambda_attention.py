"""Blocked Lambda attention against its definition, forward and backward."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.lm_infinite.lambda_attention import Scheme, lambda_attention
from clex_train.lm_infinite.stream import KeyValues, Stream
from tests.helpers.largest_tensor import LargestTensor
from tests.lm_infinite.dense_lambda import PlainRotation, dense_lambda, normal, starting_tokens

WIDTH = 8


def blocked(query, keys, values, n_local, n_global, rotation, padding=None, block_len=None) -> Tensor:
    return lambda_attention(
        query,
        KeyValues(keys, values),
        starting_tokens(keys, values, n_global, padding),
        Stream(keys.shape[2], padding),
        Scheme(n_local, rotation, SoftmaxRule(query.shape[-1] ** -0.5), block_len),
    )


# N, L, G, heads, key heads, rows, rotary dimension, C
GRID = [
    (1, 4, 2, 2, 2, 1, 8, None),
    (4, 4, 2, 2, 1, 2, 8, 3),
    (5, 4, 2, 2, 2, 1, 8, 1),
    (10, 4, 2, 4, 2, 2, 8, 3),
    (23, 4, 2, 4, 1, 2, 4, 4),
    (23, 4, 0, 2, 2, 1, 8, 5),
    (23, 4, 6, 2, 2, 1, 8, 5),
    (40, 7, 3, 4, 2, 3, 4, 16),
    (40, 1, 1, 2, 2, 1, 8, 7),
    (40, 64, 3, 2, 2, 1, 8, 16),
    (90, 16, 10, 4, 2, 2, 8, None),
]


@pytest.mark.parametrize("case", GRID, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_the_dense_definition_forward_and_backward(case, padded):
    n, n_local, n_global, heads, key_heads, rows, rotary_dim, block_len = case
    inputs = [normal(rows, h, n, WIDTH, seed=h + i) for i, h in enumerate((heads, key_heads, key_heads))]
    padding = torch.tensor([0, n // 3, n - 1][:rows][::-1]) if padded else None
    valid = None if padding is None else torch.arange(n) >= padding[:, None]
    weight = normal(rows, heads, n, WIDTH, seed=9) * (1.0 if valid is None else valid[:, None, :, None])
    results = []
    for function, extra in ((blocked, {"padding": padding, "block_len": block_len}), (dense_lambda, {"valid": valid})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves, n_local, n_global, PlainRotation(rotary_dim), **extra)
        (output * weight).sum().backward()
        results.append([output * (weight != 0), *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_kernel_without_gradients_equals_the_dense_definition(case):
    n, n_local, n_global, heads, key_heads, rows, rotary_dim, block_len = case
    query, keys, values = (normal(rows, h, n, WIDTH, seed=h) for h in (heads, key_heads, key_heads))
    rotation = PlainRotation(rotary_dim)
    output = blocked(query, keys, values, n_local, n_global, rotation, block_len=block_len)
    reference = dense_lambda(query, keys, values, n_local, n_global, rotation)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [16, 33, 50])
def test_the_original_attention_gives_the_same_output(goldens, n):
    stored = load_file(goldens / "lmi_attn.safetensors")
    query, keys, values, expected = (stored[f"attn.N{n}.L16.G4.{name}"] for name in ("q", "k", "v", "out"))
    output = blocked(query, keys, values, 16, 4, PlainRotation(8), block_len=16)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_attention_within_the_window_is_plain_causal_attention():
    query, keys, values = (normal(2, 2, 30, WIDTH, seed=seed) for seed in range(3))
    rotation = PlainRotation(WIDTH)
    turned = [rotation.consecutive(x, 0) for x in (query, keys)]
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, values, is_causal=True)
    output = blocked(query, keys, values, 30, 4, rotation, block_len=7)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_the_start_of_the_stream_does_not_change_a_bit():
    query, keys, values = (normal(1, 2, 12, WIDTH, seed=seed, dtype=torch.float32) for seed in range(3))
    start = KeyValues(normal(1, 2, 3, WIDTH, dtype=torch.float32), normal(1, 2, 3, WIDTH, dtype=torch.float32))

    def ending_at(num_tokens: int) -> Tensor:
        window = KeyValues(keys, values)
        scheme = Scheme(8, PlainRotation(WIDTH), SoftmaxRule(1.0))
        return lambda_attention(query[:, :, -4:], window, start, Stream(num_tokens), scheme)

    assert torch.equal(ending_at(1000), ending_at(10**8 + 1000))


def test_a_long_prefill_has_no_quadratic_tensor():
    """Bound the largest tensor by C x (C + L), independent of the number of tokens."""
    n, n_local, block_len = 4096, 32, 64
    query, keys, values = (normal(1, 1, n, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    with LargestTensor() as largest:
        blocked(query, keys, values, n_local, 4, PlainRotation(4), block_len=block_len)
    assert largest.elements <= max(n * 4, block_len * (block_len + n_local))
