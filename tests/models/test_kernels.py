"""Kernels of a run: one log line on optional packages, and `auto` kept in the run folder."""

import pytest
import torch
from omegaconf import OmegaConf

import train
from clex_train.utils import versions


@pytest.fixture
def run(tmp_path, tiny_run):
    """Return a function that runs train.run for two steps on a tiny model."""

    def start(*overrides: str) -> int:
        length = ("optim.batch_rows=2", "checkpoint.every=2", "optim.steps=4")
        return train.run(tiny_run(tmp_path / "run", "evaluation=never", *length, *overrides))

    start.folder = tmp_path / "run"
    return start


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_optional_packages_succeeds_and_reports_once(run, caplog, monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="clex_train"):
        run()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("attention:")] == [
        "attention: sdpa, its flash kernel, in float32 on the CPU"
    ]
    about_packages = [line for line in said if "flash-attn" in line or "liger" in line or "triton" in line]
    assert about_packages == [
        "flash-attn, liger-kernel, triton not installed: everything runs without, slower on a GPU "
        "(pip install -r requirements-gpu.txt)"
    ]


def test_nothing_is_reported_with_all_packages(run, caplog, monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: object())
    with caplog.at_level("INFO", logger="clex_train"):
        run()
    assert not [record for record in caplog.records if "not installed" in record.getMessage()]


def test_a_run_resumes_with_another_resolution_and_records_the_request(run):
    run("max_runtime=10:00:00", "optim.steps=4", "attention.implementation=auto")
    stored = OmegaConf.load(run.folder / "config.yaml")
    assert stored.attention.implementation == "auto"
    (run.folder / "final").rename(run.folder / "before")
    assert run("attention.implementation=eager", "engine.liger=never") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_kernels_are_refused_before_anything_is_read(run):
    with pytest.raises(ValueError, match=r"engine\.liger=always"):
        run("engine.liger=always", "data.path=/nowhere")
