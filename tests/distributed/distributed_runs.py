"""Launches of train.py on a tiny model, for the tests of whole distributed runs."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import environments
from tests.helpers.ports import free_port
from tests.helpers.warm_processes import Program, rank_variables, run_ranks

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass
class Launcher:
    """Run train.py as a user would, in a folder of the test."""

    folder: Path
    store: Path
    architecture: Path

    def command(self, ranks: int, name: str, *overrides: str) -> list[str]:
        """Return the command of DeepSpeed's launcher with `ranks` CPU ranks and a model of about 50,000 parameters."""
        launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", free_port()]
        return [*(launcher if ranks > 1 else [sys.executable]), *self.program(name, *overrides)]

    def program(self, name: str, *overrides: str) -> list[str]:
        """Return the command of each rank."""
        return [
            "train.py",
            "+experiment=tiny_base",
            f"output_dir={self.folder / name}",
            f"data.path={self.store}",
            f"model.config={self.architecture}",
            "model.context_len=32",
            "data.seq_len=32",
            "optim.batch_rows=8",
            "optim.steps=20",
            "optim.warmup=0.1",
            "evaluation.lengths=[32,64,128]",
            "evaluation.num_windows=2",
            "evaluation.methods=[trained]",
            "tracking.wandb=off",
            *overrides,
        ]

    def run(self, ranks: int, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run to the end without a launcher; keep the output of one rank."""
        return run_ranks(ranks, self.program(name, *overrides))

    def run_unsupervised(self, ranks: int, name: str, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
        """Run to the end without a launcher, so that no one ends a hanging rank and it fails the test."""
        port = free_port()
        started = [
            Program(self.program(name, *overrides), **rank_variables(rank, ranks, port)) for rank in range(ranks)
        ]
        return [rank.end() for rank in started]

    def launch(self, ranks: int, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run to the end as a user would from a checkout; keep the output."""
        return self._to_the_end(self.command(ranks, name, *overrides))

    def launch_module(self, ranks: int, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run to the end as a user would from an installed package; keep the output."""
        command = self.command(ranks, name, *overrides)
        at = command.index("train.py")
        return self._to_the_end([*command[:at], "--module", "clex_train.train", *command[at + 1 :]])

    def _to_the_end(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environments.launch_environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def figures(self, name: str, key: str) -> list[float]:
        """Return a metric of every step from metrics.jsonl, in order of steps."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row[key] for row in map(json.loads, lines) if key in row]
