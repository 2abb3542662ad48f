"""Evaluation protocols: spans, scored tokens, and numbers against a naive float64 Llama."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.evaluation.grid import jobs
from clex_train.evaluation.protocols import Reading, curve, readings
from clex_train.evaluation.results import Results
from clex_train.evaluation.runner import evaluate
from clex_train.rope.patch import install_rotary
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.none import none_table
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table
from tests.evaluation import plain_llama
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows

LENGTHS = [24, 48, 96, 192]
LONGEST = 192
STRIDE = 16
LAST_K = 20
WINDOWED = [protocol for protocol in Protocol if protocol not in (Protocol.streaming, Protocol.long_ppl)]


def reading_of(protocol: Protocol, lengths: list[int], context_len: int = CONTEXT_LEN, **keys: int) -> Reading:
    return readings(EvaluationConfig(lengths=lengths, protocols=[protocol], **keys), context_len)[0]


def frequencies() -> FrequencyTable:
    """Make frequencies that change with t in every pair, on a grid finer than the integers."""
    inv_freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    moving = pi_table(inv_freq, scale_grid(12, step=0.5))
    return FrequencyTable(moving.t, ntk_table(inv_freq, moving.t).inv_freq * moving.t[:, None] ** -0.25)


@pytest.fixture(scope="module")
def results() -> Results:
    """Evaluate every protocol at every length on two windows, in small chunks and batches."""
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    spec = EvaluationConfig(lengths=LENGTHS, protocols=WINDOWED, stride=STRIDE, last_k=LAST_K)
    chosen = readings(spec, CONTEXT_LEN)
    windows = random_windows(2, LONGEST)
    return evaluate(model, handle, {"moving": frequencies()}, windows, chosen, 40, 100, torch.device("cpu"))


@cache
def plain_nll(window: int, start: int, length: int, step: int) -> torch.Tensor:
    """Return nll float64 [length] of a span read `step` tokens at a time, each at the t for the tokens so far."""
    model, table = build_tiny_llama(), frequencies()
    ids = random_windows(2, LONGEST).tokens[window, start : start + length].tolist()
    stops = [*range(step, length, step), length]
    # The scale factors of the grid are 1, 1.5, 2, ...; take the least one that is at least stop / L.
    chunks = [
        (before, stop, table.at(max(1.0, math.ceil(2 * stop / CONTEXT_LEN) / 2)).inv_freq)
        for before, stop in zip([0, *stops[:-1]], stops, strict=True)
    ]
    return plain_llama.chunk_nll(model.state_dict(), model.config, ids, chunks)


def naive_start(protocol: Protocol, token: int, length: int) -> int:
    """Return the start of the span in which a token is scored."""
    if protocol is Protocol.last_k:
        return LONGEST - length
    if protocol is Protocol.sliding:
        moves = max(0, math.ceil((token + 1 - length) / STRIDE))
        return min(moves * STRIDE, LONGEST - length)
    return token // length * length


def naive_scored(protocol: Protocol, token: int) -> bool:
    if protocol is Protocol.sliding:
        return token > 0
    if protocol is Protocol.last_k:
        return token >= LONGEST - LAST_K
    pieces = [token % length for length in LENGTHS]
    return all(place % (CONTEXT_LEN if protocol is Protocol.chunked else LONGEST) for place in pieces)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("protocol", WINDOWED)
def test_every_protocol_equals_a_plain_computation_in_float64(
    results: Results, protocol: Protocol, length: int
) -> None:
    score = next(s for s in results.scores if (s.protocol, s.length) == (protocol.value, length))
    step = CONTEXT_LEN if protocol is Protocol.chunked else length
    scored = [token for token in range(LONGEST) if naive_scored(protocol, token)]
    assert score.num_tokens == 2 * len(scored)
    expected = []
    for window in range(2):
        nll = 0.0
        for token in scored:
            start = naive_start(protocol, token, length)
            nll += float(plain_nll(window, start, length, step)[token - start])
        expected.append(nll)
    assert score.window_nll == pytest.approx(expected, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / (2 * len(scored))), rel=1e-5)
    assert score.t == max(1.0, math.ceil(2 * length / CONTEXT_LEN) / 2)


@torch.no_grad()
@pytest.mark.parametrize("length", [24, 96])
def test_sliding_equals_the_strided_loop_of_transformers(length: int) -> None:
    """Use a stock model, with labels of -100 for tokens scored in an earlier span, and its mean loss times tokens."""
    windows, stock = random_windows(2, LONGEST), build_tiny_llama().eval()
    total, count = 0.0, 0
    for tokens in torch.from_numpy(windows.tokens):
        reached = 0
        for start in [*range(0, LONGEST - length, STRIDE), LONGEST - length]:
            ids = tokens[start : start + length][None]
            labels = ids.clone()
            labels[:, : max(1, reached - start)] = -100
            new = int((labels != -100).sum())
            total += float(stock(input_ids=ids, labels=labels).loss) * new
            count, reached = count + new, start + length
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    plain = none_table(handle.base_inv_freq, scale_grid(12))
    spec = EvaluationConfig(lengths=[length, LONGEST], protocols=[Protocol.sliding], stride=STRIDE)
    found = evaluate(model, handle, {"none": plain}, windows, readings(spec, CONTEXT_LEN), device=torch.device("cpu"))
    assert found.scores[0].num_tokens == count
    assert found.metrics()[f"perplexity/none/sliding/{length}"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_curve_is_the_mean_nll_of_each_position_over_all_pieces(results: Results, length: int) -> None:
    score = next(s for s in results.scores if (s.protocol, s.length) == ("per_position", length))
    bin_len = 2 if length == 192 else 1
    values: dict[int, list[float]] = {}
    for window in range(2):
        for token in range(LONGEST):
            if token % LENGTHS[0]:
                start = token // length * length
                nll = float(plain_nll(window, start, length, length)[token - start])
                values.setdefault((token - start) // bin_len, []).append(nll)
    assert [place for place, _, _ in score.curve] == [b * bin_len + bin_len // 2 for b in sorted(values)]
    assert [count for _, _, count in score.curve] == [len(values[b]) for b in sorted(values)]
    found = [nll for _, nll, _ in score.curve]
    assert found == pytest.approx([sum(values[b]) / len(values[b]) for b in sorted(values)], rel=1e-5)
    assert sum(nll * count for _, nll, count in score.curve) == pytest.approx(sum(score.window_nll))


def test_only_per_position_has_a_curve(results: Results) -> None:
    assert {score.protocol for score in results.scores if score.curve} == {"per_position"}


def test_scores_are_sorted_by_protocol_and_length_under_their_keys(results: Results) -> None:
    names = [protocol.value for protocol in WINDOWED]
    assert list(results.metrics()) == [f"perplexity/moving/{name}/{n}" for name in names for n in LENGTHS]


def test_all_lengths_of_a_protocol_score_the_same_tokens(results: Results) -> None:
    by_protocol: dict[str, set[str]] = {}
    for score in results.scores:
        by_protocol.setdefault(score.protocol, set()).add(score.fingerprint)
    assert all(len(found) == 1 for found in by_protocol.values())
    assert by_protocol["one_shot"] == by_protocol["per_position"]
    assert len(set.union(*by_protocol.values())) == len(WINDOWED) - 1


def test_protocols_share_identical_readings() -> None:
    spec = EvaluationConfig(lengths=[32, 64], protocols=WINDOWED, stride=8, last_k=16)
    shared = {
        (job.length, job.read.__name__, len(job.spans)): [reading.protocol.value for reading in job.readings]
        for job in jobs(readings(spec, CONTEXT_LEN), CONTEXT_LEN)
    }
    assert shared == {
        (32, "one_shot", 2): ["one_shot", "per_position"],
        (32, "chunked", 2): ["chunked"],
        (32, "one_shot", 5): ["sliding"],
        (32, "one_shot", 1): ["last_k"],
        (64, "one_shot", 1): ["one_shot", "sliding", "per_position", "last_k"],
        (64, "chunked", 1): ["chunked"],
    }


sizes = st.tuples(
    st.integers(2, 12), st.lists(st.integers(1, 4), max_size=3), st.integers(1, 12), st.integers(2, 20)
).map(lambda drawn: (drawn[0] * np.cumprod([1, *drawn[1]]), min(drawn[2], drawn[0]), drawn[3]))


@given(sizes)
def test_sliding_scores_every_token_once_with_almost_n_tokens_of_context(drawn) -> None:
    lengths, stride, _ = drawn
    reading = reading_of(Protocol.sliding, lengths.tolist(), stride=stride)
    longest = int(lengths[-1])
    for length, spans in reading.spans.items():
        given_ = [token for span in spans for token in range(span.first, span.stop)]
        assert given_ == sorted(set(given_))
        for span in spans:
            assert 0 <= span.start < span.first
            assert span.stop == span.start + length <= longest
            for token in range(max(span.first, length), span.stop):
                assert length - stride <= token - span.start < length
    # With a stride as long as the shortest length, the first token of each span has no context.
    without = set(range(0, longest, stride)) if stride == lengths[0] else {0}
    assert set(np.flatnonzero(~reading.scored)) == without


@given(sizes, st.sampled_from([Protocol.one_shot, Protocol.per_position, Protocol.chunked]))
def test_only_tokens_with_context_at_every_length_are_scored(drawn, protocol: Protocol) -> None:
    lengths, _, context_len = drawn
    reading = reading_of(protocol, lengths.tolist(), context_len)
    period = context_len if protocol is Protocol.chunked else int(lengths[-1])
    for token in range(int(lengths[-1])):
        assert reading.scored[token] == all(token % length % period for length in lengths.tolist())


@given(sizes)
def test_last_k_ends_every_span_at_the_end_of_the_window(drawn) -> None:
    lengths, last_k, _ = drawn
    reading = reading_of(Protocol.last_k, lengths.tolist(), last_k=last_k)
    longest = int(lengths[-1])
    assert all([(s.start, s.stop) for s in spans] == [(longest - n, longest)] for n, spans in reading.spans.items())
    unscored = longest - last_k + (1 if last_k == lengths[0] else 0)
    assert np.flatnonzero(reading.scored).tolist() == list(range(unscored, longest))


def test_last_k_defaults_to_the_context_length() -> None:
    assert reading_of(Protocol.last_k, [32, 64], context_len=16).scored.sum() == 16
    assert reading_of(Protocol.last_k, [32, 64], context_len=16, last_k=5).scored.sum() == 5


def test_a_protocol_named_twice_is_read_once() -> None:
    spec = EvaluationConfig(lengths=[16], protocols=[Protocol.one_shot, Protocol.one_shot])
    assert len(readings(spec, CONTEXT_LEN)) == 1


def test_the_curve_has_a_fixed_number_of_bins_and_counts_every_token() -> None:
    reading = reading_of(Protocol.per_position, [100, 1000])
    nll = np.random.default_rng(0).random((3, 1000))
    for bins in (1, 7, 128, 1000):
        points = curve(nll, reading.spans[1000], reading.scored, bins)
        assert len(points) <= bins
        assert sum(count for _, _, count in points) == 3 * reading.scored.sum()
        total = sum(mean * count for _, mean, count in points)
        assert total == pytest.approx(nll[:, reading.scored].sum())


@pytest.mark.parametrize(
    ("protocol", "keys", "message"),
    [
        (Protocol.sliding, {"stride": 33}, r"evaluation\.stride=33: more than the shortest of .*set .*stride=32"),
        (Protocol.sliding, {"stride": 0}, r"evaluation\.stride=0: at least 1"),
        (Protocol.last_k, {"last_k": 33}, r"evaluation\.last_k=33: more than the shortest of .*set .*last_k=32"),
        (Protocol.last_k, {"last_k": 0}, r"evaluation\.last_k=0: at least 1"),
        (Protocol.last_k, {"context_len": 48}, r"evaluation\.last_k=48: more than the shortest of"),
        (Protocol.streaming, {}, "streaming reads one long text and no windows"),
    ],
)
def test_a_protocol_that_does_not_fit_the_lengths_is_refused_in_one_line(
    protocol, keys: dict[str, int], message
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        reading_of(protocol, [32, 64], **keys)
    assert "\n" not in str(error.value)


def test_a_stride_beyond_the_lengths_only_matters_to_sliding() -> None:
    assert reading_of(Protocol.one_shot, [16, 32]).scored.sum() == 30


@settings(max_examples=12)
@given(chunk_len=st.integers(1, 200), batch_tokens=st.integers(1, 800), num_windows=st.integers(1, 2))
def test_chunks_and_batches_do_not_change_any_protocol(
    results: Results, chunk_len: int, batch_tokens: int, num_windows: int
) -> None:
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    spec = EvaluationConfig(lengths=[24, 192], protocols=WINDOWED, stride=24, last_k=LAST_K)
    chosen, windows = readings(spec, CONTEXT_LEN), random_windows(num_windows, LONGEST)
    tables, cpu = {"moving": frequencies()}, torch.device("cpu")
    found = evaluate(model, handle, tables, windows, chosen, max(chunk_len, 8), batch_tokens, cpu).scores
    whole = evaluate(model, handle, tables, windows, chosen, LONGEST, LONGEST, cpu).scores
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.window_nll == pytest.approx(theirs.window_nll, rel=1e-6)


def test_last_k_scores_a_fixed_suffix_from_half_of_l_on() -> None:
    model, windows = build_tiny_llama(), random_windows(2, 64)
    handle = install_rotary(model, CONTEXT_LEN)
    inv_freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    spec = EvaluationConfig(lengths=[CONTEXT_LEN // 2, CONTEXT_LEN, 64], protocols=[Protocol.last_k], last_k=5)
    tables = {"none": none_table(inv_freq, scale_grid(4))}
    found = evaluate(model, handle, tables, windows, readings(spec, CONTEXT_LEN))
    ids = torch.from_numpy(windows.tokens)
    for score in found.scores:
        # The same five tokens at every length, read behind more and more of the window.
        with torch.no_grad():
            logits = model(input_ids=ids[:, -score.length :], use_cache=False).logits.double()
        nll = -logits[:, -6:-1].log_softmax(-1).gather(2, ids[:, -5:, None])[..., 0]
        assert score.mean_nll == pytest.approx(float(nll.mean()), rel=1e-5)
    assert [score.length for score in found.scores] == [8, 16, 64]
    with pytest.raises(ValueError, match="last_k=16: more than the shortest"):
        readings(EvaluationConfig(lengths=[8, 16], protocols=[Protocol.last_k]), CONTEXT_LEN)
