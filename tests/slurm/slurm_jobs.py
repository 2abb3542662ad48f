"""Tiny training runs, submitted by `python -m launch.slurm` to the cluster of the tests."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.slurm.slurm_cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 160, 8
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Jobs:
    """Submit runs of about 30,000 parameters on two nodes with one CPU rank each."""

    cluster: Cluster
    folder: Path
    store: Path
    architecture: Path

    def submit(self, name: str, *overrides: str) -> str:
        """Submit `STEPS` steps of CLEX training and return the job id; `overrides` choose the layout."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launch.slurm", "+experiment=tiny_base", f"output_dir={self.folder / name}"),
                *(f"data.path={self.store}", f"model.config={self.architecture}", "model.context_len=32"),
                *("data.seq_len=32", f"optim.batch_rows={ROWS}", f"optim.steps={STEPS}", "engine.micro_batch=1"),
                *("scaling=clex", "scaling.lr_scale=1.0", "scaling.t_max=4", "evaluation.every=-1"),
                *("evaluation.lengths=[32]", "tracking.wandb=off", "checkpoint.every=25", "checkpoint.keep_last=20"),
                *("launch.nodes=2", "launch.gpus_per_node=0", "launch.ranks_per_node=1", "launch.time=50"),
                *overrides,
            ],
            cwd=ROOT,
            env={**self.cluster.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1]

    def state(self, job: str) -> str:
        return self.cluster.job(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def wait_for_step(self, job: str, name: str, step: int, seconds: float = 300) -> None:
        """Wait until the run has taken `step` steps; fail at once when the job is over."""

        def step_reached() -> bool:
            assert self.state(job) not in OVER, self.log(name)
            return self.last_step(name) >= step

        wait_for(step_reached, seconds, f"step {step} of {name}\n{self.log(name)}")

    def wait_for_end(self, job: str, name: str, seconds: float = 400) -> str:
        """Wait for the end of a job and return its state."""
        try:
            wait_for(lambda: self.state(job) in OVER, seconds, f"the end of {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(name)}\n{self.cluster.job(job)}\n{self.cluster.logs()}") from None
        return self.state(job)

    def wait_for_checkpoint(self, name: str, seconds: float = 120) -> None:
        """Wait until a checkpoint is complete, which can be some steps after the step that it saves."""
        wait_for((self.folder / name / "checkpoints" / "latest").exists, seconds, f"a checkpoint of {name}")

    def last_step(self, name: str) -> int:
        """Return the last step in metrics.jsonl, or 0."""
        rows = self._metrics(name)
        return rows[-1]["step"] if rows else 0

    def figures(self, name: str, key: str) -> list[object]:
        """Return a metric of every step, in order of steps."""
        return [row[key] for row in self._metrics(name) if key in row]

    def final(self, name: str) -> dict[str, torch.Tensor]:
        """Return every tensor of the final model: weights, ODE and frequencies."""
        files = sorted((self.folder / name / "final").glob("*.safetensors"))
        assert len(files) == 3, files
        return {f"{file.stem}/{key}": tensor for file in files for key, tensor in load_file(file).items()}

    def log(self, name: str) -> str:
        path = self.folder / name / "slurm.log"
        return path.read_text() if path.exists() else f"{path}: not there"

    def processes(self, name: str) -> dict[int, str]:
        """Return the running processes of a run, with their command lines."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            line = _read(entry / "cmdline")
            if f"{self.folder / name}/" in line:
                found[int(entry.name)] = line
        return found

    def ranks(self, name: str) -> dict[str, int]:
        """Return the training processes of a run: {`RANK=0`: process, ...}."""
        programs = [pid for pid, line in self.processes(name).items() if "/code/train.py" in line]
        variables = {pid: _read(Path(f"/proc/{pid}/environ")).split() for pid in programs}
        return {word: pid for pid, words in variables.items() for word in words if word.startswith("RANK=")}

    def kill_rank(self, name: str, rank: int) -> None:
        """Send SIGKILL to one training process."""
        os.kill(self.ranks(name)[f"RANK={rank}"], signal.SIGKILL)

    def _metrics(self, name: str) -> list[dict[str, object]]:
        """Return the lines of steps, without those of saves and evaluations."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n") and '"loss"' in line]


def _read(path: Path) -> str:
    """Read a file of /proc with zeros as spaces; empty if the process has ended."""
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def assert_same_run(jobs: Jobs, name: str, reference: str) -> None:
    """Assert that rows, metrics and the final model of two runs are bitwise equal."""
    steps = list(range(1, STEPS + 1))
    assert jobs.figures(name, "step") == steps
    read = [row for spans in jobs.figures(name, "rows") for first, last in spans for row in range(first, last + 1)]
    assert read == list(range(STEPS * ROWS)), "a row was lost or read twice"
    for key in ("loss", "t", "grad_norm", "ode_grad_norm"):
        assert jobs.figures(name, key) == jobs.figures(reference, key), key
    ours, theirs = jobs.final(name), jobs.final(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
