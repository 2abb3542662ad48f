"""Metrics of a step: the peak of a GPU by its name, and MFU from it."""

import pytest

from clex_train.tracking import metrics
from clex_train.utils import distributed


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_the_peak_follows_from_the_name_of_the_gpu(name, tflops):
    assert metrics.named_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA H1000", "Tesla V100-SXM2-32GB"])
def test_a_name_that_only_resembles_a_known_one_has_no_peak(name):
    assert metrics.named_peak(name) is None


def test_mfu_is_the_share_of_the_peak_of_all_devices_and_left_out_where_the_peak_is_unknown(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    # PaLM's appendix B by hand: 6 N + 6 * layers * heads * head dim * S, the causal half of its attention term.
    per_token = metrics.flops_per_token(1e9, num_layers=10, num_heads=8, head_dim=64, seq_len=1000)
    assert per_token == 6e9 + 6 * 10 * 8 * 64 * 1000
    figures = metrics.speed(0, 50_000, 2.0, per_token, peak_tflops=100.0)
    assert figures["mfu"] == pytest.approx(25_000 * per_token / (4 * 100e12))
    assert figures["tokens_per_second"] == 25_000
    monkeypatch.setattr(metrics, "device_peak", lambda: None)
    assert "mfu" not in metrics.speed(0, 50_000, 2.0, per_token)
