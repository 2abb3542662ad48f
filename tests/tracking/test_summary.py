"""The first lines of a program: the run, its model and its data, printed before any expensive work."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from clex_train.cli import loading
from clex_train.config.model import ModelConfig
from clex_train.engine import deepspeed as engines
from clex_train.tracking import summary
from clex_train.utils import log
from tests.helpers.composing import composed


class Reached(Exception):
    """Raised when a run opens its device."""


@pytest.fixture
def first_lines(tmp_path, tiny_run, monkeypatch, capsys):
    """Return a function that gives all output of a run before it opens a process group."""

    def stop(*_):
        raise Reached

    monkeypatch.setattr(engines, "open_process_group", stop)

    def lines(*overrides: str) -> list[str]:
        with pytest.raises(Reached):
            train.run(tiny_run(tmp_path / "run", *overrides))
        return capsys.readouterr().err.splitlines()

    return lines


def test_a_run_names_weights_length_method_batch_steps_and_folder(first_lines, tmp_path, tiny_store, tiny_architecture):
    overrides = ("scaling=clex", "scaling.t_max=4", "optim.batch_rows=8", "optim.steps=20", "optim.lr=1e-3")
    title, *lines = first_lines(*overrides)
    assert title.startswith("train tiny_base, a new run, on the CPU (torch ")
    block = dict(line.strip().split(maxsplit=1) for line in lines if line.startswith("  "))
    assert block["model"].startswith(f"random weights for the architecture of {tiny_architecture}: llama, ")
    assert block["model"].endswith(" parameters, float32")
    assert block["context"].startswith("L = 32 tokens (")
    assert block["scaling"].startswith(
        "clex: t from 1 to 4, field log_time, drift yarn, L = 32: contexts up to 128 tokens; positions skip, 20 % of "
    )
    assert block["data"].startswith(f"{tiny_store}: ")
    assert block["begin"] == "documents have no BOS, as the tokenizer does"
    assert block["batch"] == "8 sequences * 32 tokens = 256 tokens a step: 1 rank * 8 sequences * 1 micro-batch"
    assert block["steps"] == "20, in all 5,120 tokens"
    assert "lr 0.001, cosine after" in block["optimizer"]
    assert block["engine"] == "DeepSpeed ZeRO-3, 1 rank"
    assert block["held"].startswith(f"out    {tiny_store}: ")
    assert block["evaluation"].startswith("32 (1 L), 64 (2 L) tokens; ")
    assert block["output"].startswith(f"{tmp_path / 'run'}: ")
    assert "SIGTERM" in block["to"]


def test_weights_are_described_as_pretrained_or_random():
    named, drawn = ModelConfig(path="models/a", config="shapes/b"), ModelConfig(config="shapes/b")
    assert summary.weights_of(named) == "pretrained weights of models/a"
    assert summary.weights_of(drawn) == "random weights for the architecture of shapes/b"
    assert "not on this machine; planned by the architecture of shapes/b" in summary.weights_of(named, is_there=False)


def test_sequence_parallel_ranks_are_counted_as_groups():
    config = composed("+experiment=llama2_7b_clex_64k", "dry_run=true")
    subject = summary.Subject("weights", "llama", 1, torch.bfloat16, 4096, "model.context_len")
    lines = list(summary.training(config, subject, summary.Batch(16, 1, 16), []))
    assert any(line.endswith("2 groups of 8 ranks * 1 sequence * 16 micro-batches") for line in lines)


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setattr("clex_train.utils.distributed.rank", lambda: 1)
    summary.print_summary("title", ["  line"])
    assert capsys.readouterr() == ("", "")


def log_to_stderr(monkeypatch) -> None:
    """Send the log of a program to the stderr that a test captures."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log.setup()


def test_messages_before_the_summary_are_logged_after_it(
    first_lines, tmp_path, tiny_store, tiny_architecture, monkeypatch, capsys
):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_architecture, vocab_size=512))
    model.save_pretrained(tmp_path / "mine")
    capsys.readouterr()
    log_to_stderr(monkeypatch)
    overrides = (f"model.path={tmp_path / 'mine'}", f"model.tokenizer={tiny_store / 'tokenizer'}")
    title, *lines = first_lines(*overrides, "evaluation.num_windows=100000")
    assert title.startswith("train tiny_base, a new run, ")
    block = [line for line in lines if line.startswith("  ")]
    assert lines[: len(block)] == block, "\n".join(lines)
    assert "model.config=" in lines[len(block)]
    assert "evaluation.num_windows=100000: " in lines[len(block) + 1]


def test_a_refusal_follows_the_messages_logged_before_it(monkeypatch, capsys):
    log_to_stderr(monkeypatch)

    @log.buffered()
    def refused():
        log.get("clex_train").warning("found")
        assert capsys.readouterr().err == ""
        raise ValueError("x=1: refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert capsys.readouterr().err.endswith(" found\n")


def test_other_ranks_log_at_once_after_the_summary_of_rank_0(monkeypatch, capsys):
    log_to_stderr(monkeypatch)
    monkeypatch.setattr("clex_train.utils.distributed.rank", lambda: 1)
    for say in (lambda: summary.print_summary("title", []), lambda: loading.print_plan("evaluate", None, None, [])):
        with log.buffered():
            log.get("clex_train").warning("found")
            assert capsys.readouterr().err == ""
            say()
            assert capsys.readouterr().err.endswith(" found\n")
