"""The stored frequency table: exact members, the least-upper-bound rule, and its file."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table

BASE = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
TABLE = ntk_table(BASE, scale_grid(16))


def test_at_gives_the_row_of_a_member_and_its_t() -> None:
    spectrum = TABLE.at(5)
    assert spectrum.t == 5.0
    assert torch.equal(spectrum.inv_freq, TABLE.inv_freq[4])


def test_at_refuses_values_between_members_and_names_the_members() -> None:
    with pytest.raises(ValueError, match=r"t=2\.5: not on the table's grid of 16 scale factors \(nearest: 2, 3\)"):
        TABLE.at(2.5)
    with pytest.raises(ValueError, match="t=17"):
        TABLE.at(17)


@pytest.mark.parametrize("num_tokens", [1, 63, 64])
def test_t_is_1_up_to_the_trained_context(num_tokens: int) -> None:
    assert TABLE.least_upper_bound(num_tokens, 64).t == 1.0


def test_t_moves_with_the_first_token_beyond_a_multiple() -> None:
    assert [TABLE.least_upper_bound(n, 64).t for n in (65, 128, 129, 1024)] == [2.0, 2.0, 3.0, 16.0]


@settings(max_examples=100)
@given(st.integers(1, 10**7), st.integers(1, 200_000), st.sampled_from([1.0, 0.5, 0.25, 0.1, 0.3]))
def test_least_upper_bound_is_the_smallest_sufficient_member(num_tokens: int, context_len: int, step: float) -> None:
    table = FrequencyTable(scale_grid(50, step), BASE.expand(len(scale_grid(50, step)), -1))
    if num_tokens > 50 * context_len:
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens}: beyond"):
            table.least_upper_bound(num_tokens, context_len)
        return
    # Decimal grids are exact as fractions, so that 1.1 * 10 tokens are 11 tokens, without rounding up.
    grid = [Fraction(1) + k * Fraction(str(step)) for k in range(int(49 / step) + 2)]
    expected = min(t for t in (*(g for g in grid if g < 50), Fraction(50)) if t * context_len >= num_tokens)
    assert table.least_upper_bound(num_tokens, context_len).t == pytest.approx(float(expected), abs=1e-9)


def test_the_same_t_gives_the_same_object() -> None:
    assert TABLE.least_upper_bound(65, 64) is TABLE.least_upper_bound(128, 64)


def test_beyond_t_max_is_an_error_that_names_the_numbers_or_a_clamp_on_request() -> None:
    with pytest.raises(ValueError, match=r"num_tokens=1025: beyond t_max \* L = 16 \* 64 = 1024 tokens"):
        TABLE.least_upper_bound(1025, 64)
    assert TABLE.least_upper_bound(10**9, 64, clamp=True).t == 16.0


def test_a_saved_table_reads_back_bitwise(tmp_path: Path) -> None:
    factors = 1 + torch.log(TABLE.t) / 3
    table = FrequencyTable(TABLE.t, TABLE.inv_freq / 3, "clex", 4096, digest="ab12", attention_factors=factors)
    table.save(tmp_path / "table.safetensors")
    back = FrequencyTable.load(tmp_path / "table.safetensors")
    assert torch.equal(back.t, table.t)
    assert torch.equal(back.inv_freq, table.inv_freq)
    assert (back.method, back.context_len, back.digest) == ("clex", 4096, "ab12")
    assert torch.equal(back.attention_factors, factors)


def test_each_t_has_its_own_attention_factor_and_1_without_any() -> None:
    table = FrequencyTable(TABLE.t, TABLE.inv_freq, attention_factors=1 + torch.log(TABLE.t) / 3)
    assert [table.at(t).attention_factor for t in (1, 4)] == pytest.approx([1.0, 1 + math.log(4) / 3])
    assert table.least_upper_bound(65, 64).attention_factor == table.to("cpu").at(2).attention_factor > 1
    assert {TABLE.at(t).attention_factor for t in range(1, 17)} == {1.0}


@pytest.mark.parametrize(("written", "expected"), [(None, 1.0), ("1.0", 1.0), ("1.25", 1.25)])
def test_files_with_one_factor_in_their_metadata_still_load(tmp_path: Path, written, expected: float) -> None:
    metadata = {"method": "clex", "context_len": "64"} | ({} if written is None else {"attention_factor": written})
    save_file({"t": TABLE.t, "inv_freq": TABLE.inv_freq}, str(tmp_path / "table.safetensors"), metadata=metadata)
    back = FrequencyTable.load(tmp_path / "table.safetensors")
    assert {back.at(t).attention_factor for t in (1, 7, 16)} == {expected}
    assert (back.method, back.context_len) == ("clex", 64)


@pytest.mark.parametrize("factors", [[1.0, 0.0, 1.0], [1.0, math.nan, 1.0], [1.0, 1.0, math.inf]])
def test_attention_factors_that_do_not_fit_are_refused(factors: list[float]) -> None:
    with pytest.raises(ValueError, match="one for each of 3 scale factors, finite and positive"):
        FrequencyTable(TABLE.t[:3], TABLE.inv_freq[:3], attention_factors=torch.tensor(factors).double())


def test_a_view_of_a_larger_tensor_can_be_saved(tmp_path: Path) -> None:
    FrequencyTable(TABLE.t[:4], TABLE.inv_freq[:4], "ntk").save(tmp_path / "table.safetensors")
    assert FrequencyTable.load(tmp_path / "table.safetensors").t_max == 4.0


@pytest.mark.parametrize("content", ["missing", "garbage", "truncated", "other tensors", "bad grid"])
def test_a_file_that_is_not_a_table_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.safetensors"
    if content == "garbage":
        path.write_bytes(b"\x07" * 100)
    elif content == "truncated":
        TABLE.save(path)
        path.write_bytes(path.read_bytes()[:-8])
    elif content == "other tensors":
        save_file({"weight": torch.zeros(2)}, str(path))
    elif content == "bad grid":
        save_file({"t": torch.tensor([2.0, 1.0]).double(), "inv_freq": torch.ones(2, 3).double()}, str(path))
    with pytest.raises(ValueError, match=r"table\.safetensors: not a frequency table") as error:
        FrequencyTable.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grid", [[], [2.0, 3.0], [1.0, 1.0], [1.0, 3.0, 2.0]])
def test_a_grid_that_does_not_ascend_from_1_is_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="must ascend from 1"):
        FrequencyTable(torch.tensor(grid, dtype=torch.float64), torch.ones(len(grid), 4, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_non_finite_and_non_positive_frequencies_are_refused_by_index(value: float) -> None:
    inv_freq = pi_table(BASE, scale_grid(4)).inv_freq.clone()
    inv_freq[2, 5] = value
    with pytest.raises(ValueError, match=r"inv_freq\[2, 5\]=.* at t=3: frequencies must be finite and positive"):
        FrequencyTable(scale_grid(4), inv_freq)


def test_scale_grid_has_integers_by_default_and_always_ends_at_t_max() -> None:
    assert scale_grid(4).tolist() == [1, 2, 3, 4]
    assert scale_grid(2.5).tolist() == [1, 2, 2.5]
    assert scale_grid(1).tolist() == [1]
    assert scale_grid(2, 0.25).tolist() == [1, 1.25, 1.5, 1.75, 2]
    assert len(scale_grid(16, 0.1)) == 151


def test_scale_grid_refuses_an_invalid_range() -> None:
    with pytest.raises(ValueError, match=r"t_max=0\.5"):
        scale_grid(0.5)
    with pytest.raises(ValueError, match="step=0"):
        scale_grid(4, 0)


class TestTFactor:
    """`t_factor`: a call uses the t of a context `t_factor` times as long."""

    def test_is_the_least_upper_bound_for_the_scaled_length_up_to_t_max(self) -> None:
        table = replace(ntk_table(BASE, [1.0, 2.0, 3.0, 4.0, 8.0]), t_factor=1.5)
        assert [table.least_upper_bound(n, 16).t for n in (8, 16, 32, 48, 64, 128)] == [1.0, 2.0, 3.0, 8.0, 8.0, 8.0]
        with pytest.raises(ValueError, match="num_tokens=129: beyond t_max"):
            table.least_upper_bound(129, 16)
        assert table.least_upper_bound(129, 16, clamp=True).t == 8.0

    def test_is_preserved_by_files_and_device_moves(self, tmp_path: Path) -> None:
        replace(TABLE, t_factor=2.0).save(tmp_path / "t.safetensors")
        assert FrequencyTable.load(tmp_path / "t.safetensors").t_factor == 2.0
        assert replace(TABLE, t_factor=2.0).to("cpu").t_factor == 2.0
        TABLE.save(tmp_path / "plain.safetensors")
        assert FrequencyTable.load(tmp_path / "plain.safetensors").t_factor == 1.0

    @pytest.mark.parametrize("t_factor", [0.5, float("nan"), float("inf")])
    def test_is_finite_and_at_least_1(self, t_factor: float) -> None:
        with pytest.raises(ValueError, match="t_factor="):
            replace(TABLE, t_factor=t_factor)
