"""The commands of docs/your_model.md, run on a small Qwen3 and a folder of Python sources."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import environments
from tests.helpers.warm_processes import Program

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
CONTEXT_LEN = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_store) -> Path:
    """Make a folder that looks like the repository, with `models/mine` and `texts` in it."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("your_model")
    for name in ("train.py", "clex_train", "data_prep", "conf", "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_store.parent / "texts", folder / "texts")
    tokenizer = AutoTokenizer.from_pretrained(tiny_store.parent / "tokenizer")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT_LEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder / "models" / "mine")
    tokenizer.save_pretrained(folder / "models" / "mine")
    return folder


@pytest.fixture(scope="module")
def outputs(place) -> list[str]:
    """Run the blocks of the page in order and return their outputs; the first failure ends the module."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = environments.launch_environment(PATH=path, WANDB_MODE="offline")
    printed = []
    for language, text in BLOCKS:
        command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout + done.stderr)
    return printed


def test_the_store_is_written_with_held_out_documents(outputs, place):
    assert (place / "corpora" / "mine").is_dir()
    assert re.search(r"validation.*[1-9]", outputs[0])


def test_the_plan_and_the_run_start_with_the_same_model_line(outputs, place):
    plan, run = outputs[1], outputs[2]
    lines = [
        line for line in plan.splitlines() if line.startswith(("  model ", "  context ", "  scaling ", "  batch "))
    ]
    assert len(lines) == 4
    assert "pretrained weights of models/mine: qwen3" in lines[0]
    assert f"L = {CONTEXT_LEN} tokens" in lines[1]
    assert set(lines) <= set(run.splitlines())


def test_training_starts_from_the_weights_of_the_directory(outputs, place):
    """Compare embeddings: 20 steps at the learning rate of the page move them less than another seed would."""
    import torch
    from safetensors.torch import load_file

    before, after = (
        load_file(place / folder / "model.safetensors")["model.embed_tokens.weight"].flatten()
        for folder in ("models/mine", "runs/mine/final")
    )
    assert float(torch.corrcoef(torch.stack((before, after)))[0, 1]) > 0.9
    assert not torch.equal(before, after)


def test_the_run_writes_the_files_that_the_page_lists(outputs, place):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report/index.html", "checkpoints", "final"):
        assert f"`{name.split('/')[0]}" in PAGE
        assert (place / "runs" / "mine" / name).exists()
    assert list((place / "runs" / "mine" / "evaluation").glob("*.json"))
    last = json.loads(outputs[3].splitlines()[0])
    assert {"step", "loss", "lr", "t", "grad_norm", "tokens_per_second"} <= set(last)


def test_the_evaluation_prints_a_row_for_each_method(outputs):
    for method in ("trained", "none", "ntk"):
        assert re.search(rf"^{method}\s+\d", outputs[4], re.MULTILINE)


def test_the_model_before_training_has_separate_results(outputs, place):
    assert re.search(r"^trained\s+\d", outputs[5], re.MULTILINE)
    assert (place / "runs" / "mine_before" / "evaluation" / "mine_before.json").is_file()


def test_the_answer_continues_the_prompt(outputs):
    assert "In the beginning" in outputs[6]


def test_the_plan_for_eight_gpus_succeeds(outputs):
    assert "memory of one GPU of 8" in outputs[7]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("model.path=models/other",), "model.path=models/other: no such directory"),
        (("model.path=models/mine", "evaluation.lengths=[131072]", "scaling.t_max=2048"), "evaluation.lengths="),
        (("model.path=models/mine", "optim.batch_rows=3", "engine.micro_batch=2"), "optim.batch_rows=3: must be"),
    ],
)
def test_the_three_refusals_match_the_page(outputs, place, arguments, line):
    command = ["train.py", "name=refused", "data.path=corpora/mine", "scaling=clex", *arguments]
    done = Program(command, place).end()
    assert done.returncode == 2, done.stderr
    refusals = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(refusals) == 1
    assert refusals[0].startswith(f"error: {line}")
