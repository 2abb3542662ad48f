"""Records of a demo that its page and its forecasts need: seconds and command of each stage, and the precision."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from clex_train.evaluation import results
from clex_train.utils import files
from launch import demo_plan
from launch.demo_plan import PYTHON, Size, Stage

FASTER = 1.3
"""Least gain of bf16 in speed for which its rounding is accepted."""


class Records:
    """The file `stages.json` in the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"

    def read(self) -> dict[str, Any]:
        """Return the content; empty before the first stage."""
        found: dict[str, Any] = {"stages": {}}
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else found

    def add(self, stage: Stage, seconds: float) -> None:
        """Add the time of a stage to what an interrupted attempt took."""
        content = self.read()
        before = content["stages"].get(stage.title, {"seconds": 0.0})["seconds"]
        command = shlex.join("python" if part == PYTHON else part for part in stage.command)
        content["stages"][stage.title] = {"seconds": round(before + seconds, 1), "command": command}
        self._write(content)

    def spent(self) -> float:
        """Return the seconds of all stages together."""
        return float(sum(each["seconds"] for each in self.read()["stages"].values()))

    def precision(self) -> str:
        """Return bf16 where this CPU multiplies it faster, else fp32; measured once, so that a resumed demo agrees."""
        content = self.read()
        if "precision" not in content:
            content |= measure_precision()
            self._write(content)
        return str(content["precision"])

    def with_steps(self, size: Size, budget: float) -> Size:
        """Return `size` with the training steps that fit into `budget` seconds; chosen once, as a resumed run needs."""
        content = self.read()
        if "steps" not in content:
            chosen = demo_plan.steps_for(budget - self.spent(), self.reading(size))
            content["steps"] = size.steps if size.is_smoke else chosen
            self._write(content)
        return replace(size, steps=content["steps"])

    def reading(self, size: Size) -> float:
        """Return the seconds of one reading of 2 L tokens, the slowest that the first evaluation measured."""
        scores = results.read(size.folder / "evaluation" / "untrained.json")[0].scores
        return max(score.seconds for score in scores if score.length == size.lengths[1])

    def _write(self, content: dict[str, Any]) -> None:
        files.make_folder(self.path.parent)
        files.write_atomically(self.path, json.dumps(content, indent=1) + "\n")


def measure_precision() -> dict[str, Any]:
    """Time the model's MLP product in both types; many CPUs compute bf16 in software, ten times slower."""
    # Imported late: the program starts without torch.
    import torch

    speeds = {"fp32": _speed(torch.float32), "bf16": _speed(torch.bfloat16)}
    chosen = "bf16" if speeds["bf16"] > FASTER * speeds["fp32"] else "fp32"
    print(
        f"precision {chosen}: products of {speeds['fp32']:.0f} GFLOP/s in fp32, {speeds['bf16']:.0f} in bf16",
        flush=True,
    )
    return {"precision": chosen, "gflops": {name: round(speed, 1) for name, speed in speeds.items()}}


def _speed(dtype: Any) -> float:
    import torch

    tokens, width, inner = 1024, 576, 1536
    inputs, weights = torch.randn(tokens, width, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    best = float("inf")
    # The first call prepares the kernel, and another program may disturb one of the others.
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weights)
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * width * inner / best / 1e9
