"""The constant-size cache in float64: a stream in pieces of any size matches the definition to 1e-10."""

import pytest
import torch
from torch import Tensor

from clex_train.attention.padding import gather_tokens, invert_order, left_pad_order
from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.lm_infinite.cache import LambdaCacheLayer
from clex_train.lm_infinite.lambda_attention import Scheme, lambda_attention
from clex_train.lm_infinite.stream import KeyValues
from tests.lm_infinite.dense_lambda import PlainRotation, dense_lambda, normal

WIDTH = 8

# pieces, L, G, heads, key heads, rows, C
GRID = [
    ([1] * 30, 4, 2, 2, 2, 1, 8),
    ([10, 1, 1, 1, 12, 5], 4, 2, 4, 2, 2, 3),
    ([3, 30, 2, 20], 6, 0, 2, 1, 3, 7),
    ([40, 1, 40, 1, 1], 20, 3, 2, 2, 2, 16),
    ([2, 2, 40, 30], 5, 9, 4, 2, 2, 6),
    ([64, 70], 16, 4, 2, 2, 1, 64),
]


def streamed(query, keys, values, pieces, n_local, n_global, block_len, valid) -> Tensor:
    """Compute [B, H, N, D], passing each piece through the cache as `layer` does."""
    layer, seen, outputs = LambdaCacheLayer(n_local, n_global), 0, []
    scheme = Scheme(n_local, PlainRotation(WIDTH), SoftmaxRule(WIDTH**-0.5), block_len)
    for size in pieces:
        piece, seen = slice(seen, seen + size), seen + size
        layer.expect(len(keys), valid[:, piece])
        window = KeyValues(*layer.update(keys[:, :, piece], values[:, :, piece]))
        order = left_pad_order(valid[:, piece])
        output = lambda_attention(gather_tokens(query[:, :, piece], order), window, layer.start, layer.stream, scheme)
        outputs.append(gather_tokens(output, invert_order(order)))
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("case", GRID, ids=str)
@pytest.mark.parametrize("padding", ["none", "front", "scattered"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_pieces_through_the_cache_equal_the_dense_definition(case, padding, with_gradients):
    pieces, n_local, n_global, heads, key_heads, rows, block_len = case
    n = sum(pieces)
    inputs = [normal(rows, h, n, WIDTH, seed=h + i) for i, h in enumerate((heads, key_heads, key_heads))]
    valid = torch.ones(rows, n, dtype=torch.bool)
    if padding == "front":
        valid[-1, : n // 3] = False
    if padding == "scattered":
        valid = normal(rows, n, seed=5) > -0.7
    weight = normal(rows, heads, n, WIDTH, seed=9) * valid[:, None, :, None]
    shape = (pieces, n_local, n_global, block_len, valid)
    results = []
    for function, extra in ((streamed, shape), (dense_lambda, (n_local, n_global, PlainRotation(WIDTH), valid))):
        leaves = [x.clone().requires_grad_(with_gradients) for x in inputs]
        output = function(*leaves, *extra)
        if with_gradients:
            (output * weight).sum().backward()
        results.append([output * (weight != 0), *(leaf.grad for leaf in leaves if with_gradients)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
