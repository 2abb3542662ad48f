"""Attention to middle tokens, against its definition, with and without a cache."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.lm_infinite import middle_tokens
from clex_train.lm_infinite.back_ends import BlockedSdpa
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.lm_infinite.lambda_attention import Scheme, lambda_attention
from clex_train.lm_infinite.middle_tokens import BestMiddle, WholeMiddle
from clex_train.lm_infinite.stream import KeyValues, Stream
from tests.helpers.largest_tensor import LargestTensor
from tests.lm_infinite.dense_lambda import PlainRotation, Unrotated, dense_lambda, normal, starting_tokens
from tests.rope.rotary_families import tiny_model, tokens

WIDTH = 8

# N, L, G, heads, key heads, rows, C, middle keys per chunk, k
GRID = [
    (10, 4, 2, 2, 2, 1, 3, 2, 2),
    (30, 4, 0, 4, 2, 2, 5, 7, 5),
    (41, 7, 3, 4, 1, 3, 16, 1024, 1),
    (40, 5, 9, 2, 2, 2, 6, 11, 3),
    (9, 16, 2, 2, 2, 2, 4, 8, 4),
]


@pytest.fixture
def small_chunks(monkeypatch):
    def set_to(size: int) -> None:
        monkeypatch.setattr(middle_tokens, "chunk_len", lambda n_local: size)

    return set_to


@pytest.mark.parametrize("case", GRID, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("let_in", ["best", "whole"])
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_blocks_equal_the_dense_definition_forward_and_backward(case, padded, let_in, positions, small_chunks):
    n, n_local, n_global, heads, key_heads, rows, block_len, chunk, best = case
    small_chunks(chunk)
    way = BestMiddle(best, first_layer=0) if let_in == "best" else WholeMiddle()
    rotation = PlainRotation(WIDTH) if positions == "rotary" else Unrotated()
    slopes = None if positions == "rotary" else 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)
    rule = SoftmaxRule(WIDTH**-0.5, slopes=slopes)
    padding = torch.tensor([0, n // 3, n - 1][:rows][::-1]) if padded else None
    valid = None if padding is None else torch.arange(n) >= padding[:, None]

    def blocked(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        start = starting_tokens(keys, values, n_global, padding)
        scheme = Scheme(n_local, rotation, rule, block_len, way)
        return lambda_attention(query, KeyValues(keys, values), start, Stream(n, padding), scheme)

    def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # If only the distance is limited, every token counts as a starting token.
        first = n if let_in == "whole" else n_global
        chosen = best if let_in == "best" else 0
        return dense_lambda(query, keys, values, n_local, first, rotation, valid, chosen, slopes)

    inputs = [normal(rows, h, n, WIDTH, seed=h + i) for i, h in enumerate((heads, key_heads, key_heads))]
    weight = normal(rows, heads, n, WIDTH, seed=9) * (1.0 if valid is None else valid[:, None, :, None])
    results = []
    for function in (blocked, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        (output * weight).sum().backward()
        results.append([output * (weight != 0), *(leaf.grad for leaf in leaves)])
    with torch.no_grad():
        results[0].append(blocked(*inputs) * (weight != 0))
        results[1].append(results[1][0])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", [BestMiddle(3, first_layer=1), WholeMiddle()], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_read_in_chunks_matches_one_forward(way, side):
    """Include a padded batch; the tolerance is 1e-6 because cos and sin are float32 in every dtype."""
    model = tiny_model("llama", num_layers=3, dtype=torch.float64)
    apply_lm_infinite(model, 6, 2, block_len=4, middle=way)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, slice(0, 7) if side == "left" else slice(9, 16)] = 0
    cache, seen, outputs = DynamicCache(), 0, []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, mask[1].bool()]).logits[0]
        for size in (16, 1, 1, 9, 1, 12):
            piece, seen = ids[:, seen : seen + size], seen + size
            call = {"attention_mask": mask[:, :seen], "past_key_values": cache, "use_cache": True}
            outputs.append(model(piece, **call).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[1][mask[1].bool()], alone, rtol=0, atol=1e-6)


def test_only_layers_from_the_first_layer_on_attend_to_the_middle():
    ids, logits = tokens(1, 40), []
    for first_layer in (0, 1, 2):
        model = tiny_model("llama", num_layers=3, dtype=torch.float64)
        apply_lm_infinite(model, 6, 2, middle=BestMiddle(3, first_layer))
        with torch.no_grad():
            logits.append(model(ids, output_hidden_states=True).hidden_states)
    assert torch.equal(logits[1][1], logits[2][1])
    assert not torch.equal(logits[0][1], logits[1][1])
    assert not torch.equal(logits[1][2], logits[2][2])


def test_selecting_all_middle_keys_attends_to_all_of_them_at_half_the_distance():
    """Set ALiBi's slopes to 0 without rotation, so that distance does not matter and plain attention results."""
    query, keys, values = (normal(1, 2, 50, WIDTH, seed=seed) for seed in range(3))
    scheme = Scheme(6, Unrotated(), SoftmaxRule(WIDTH**-0.5), 8, BestMiddle(50, first_layer=0))
    output = lambda_attention(query, KeyValues(keys, values), None, Stream(50), scheme)
    plain = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-12)


def test_no_matrix_of_all_queries_and_keys_is_created():
    n, block_len = 4096, 64
    query, keys, values = (normal(1, 1, n, 4, seed=seed) for seed in range(3))
    for way in (BestMiddle(5, first_layer=0), WholeMiddle()):
        scheme = Scheme(32, PlainRotation(4), SoftmaxRule(0.5), block_len, way)
        with LargestTensor() as largest:
            lambda_attention(query, KeyValues(keys, values), None, Stream(n), scheme)
        # The mask of one block over all keys is the largest.
        assert largest.elements <= block_len * n


class TestRefusals:
    """Refusals, in one line that names the reason."""

    @pytest.mark.parametrize(("num_keys", "first_layer"), [(0, 0), (5, -1)])
    def test_numbers_out_of_range(self, num_keys, first_layer):
        with pytest.raises(ValueError, match=f"num_keys={num_keys}, first_layer={first_layer}"):
            BestMiddle(num_keys, first_layer)

    def test_a_first_layer_that_the_model_does_not_have(self):
        with pytest.raises(ValueError, match="none of the model's 2 layers"):
            apply_lm_infinite(tiny_model("llama"), 8, 2, middle=BestMiddle(5, first_layer=2))

    def test_a_cache_that_drops_the_middle(self):
        model = tiny_model("llama")
        constant = apply_lm_infinite(model, 8, 2)
        cache = constant.new_cache()
        constant.undo()
        handle = apply_lm_infinite(model, 8, 2, middle=WholeMiddle())
        with pytest.raises(ValueError, match="DynamicCache"):
            handle.new_cache()
        with pytest.raises(ValueError, match="LambdaCache"):
            model(tokens(1, 4), past_key_values=cache, use_cache=True)


def test_a_back_end_does_not_save_the_scores_of_the_middle():
    """Recompute blocks of flex_attention: saved for all blocks, the scores of the middle would be n x n."""
    n, kept = 400, 0

    class KeepsNothing(BlockedSdpa):
        recomputes = False

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    inputs = [normal(1, 2, n, WIDTH, seed=seed).requires_grad_() for seed in range(3)]
    rule = SoftmaxRule(WIDTH**-0.5)
    scheme = Scheme(8, PlainRotation(WIDTH), rule, 20, WholeMiddle(), KeepsNothing())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lambda_attention(inputs[0], KeyValues(*inputs[1:]), None, Stream(n), scheme).sum().backward()
    assert kept < 2 * n * n
