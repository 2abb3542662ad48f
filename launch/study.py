"""Study behind docs/results.md: one base model, every method fine-tuned from it with the same budget, one table.

    python -m launch.study --books 'DIR/*.jsonl.zst' [--out runs/study] [--jobs 2] [--seeds 1 2 3] [--smoke]

    1 corpus      tokenizer, token stores of the books (a share of whole books held out) and of retrieval text
    2 base        a small Llama with plain RoPE                          train.py +experiment=study_base
    3 arms        each arm of `study_arms` from that base, per seed      train.py +experiment=study_finetune scaling=...
    4 evaluation  on held-out windows, separate ones for choosing        clex_train.cli.evaluate run=...
    5 tables      the record of all figures, and the tables made of it   OUT/report/study.json, OUT/report/tables.md

A stage whose result exists is skipped, and an interrupted training run resumes from its checkpoint: run the same
command again to continue. `--jobs` processes of one thread each run in parallel.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from launch import stages

    stages.listen()

from clex_train.resilience.stop_requests import Interrupted
from clex_train.utils import terminal
from clex_train.utils.errors import ConfigError, InputError
from clex_train.utils.files import require_writable_folder
from clex_train.utils.locations import ROOT
from data_prep.config import Format
from data_prep.corpus.sources import expand
from launch import stages, study_record, study_stages, study_tables
from launch.study_arms import ARMS, BASE_METHODS, CHOOSING, JUDGING, Arm, Windows

CONTEXT_LEN = 128
LENGTHS = [CONTEXT_LEN * multiple for multiple in (1, 2, 4, 8, 16, 32)]
PROMPT_LENGTHS = [CONTEXT_LEN * multiple for multiple in (1, 2, 4, 8, 16)]
READINGS = ["protocols=[one_shot,last_k]", "depths=[0.1,0.5,0.9]"]
DISTANCES = [64, 512]
"""Of repetitions, in tokens: within L and at 4 L. All doublings would take as long as everything else."""
KINDS = "kinds=[passkey,repeat,quote,quote,quote]"
SMOKE = ["optim.steps=6"]


@dataclass(frozen=True)
class Study:
    """Paths of the study and the part of it to run."""

    books: str
    out: Path
    seeds: list[int]
    smoke: bool
    only: list[str] | None = None
    precision: str = "fp32"

    @property
    def store(self) -> Path:
        """Token store of the books."""
        return self.out / "books"

    @property
    def retrieval(self) -> Path:
        """Token store of the synthetic retrieval text."""
        return self.out / "retrieval"

    @property
    def base(self) -> Path:
        """Run folder of the base model."""
        return self.out / "base"

    def windows(self, arm: Arm, seed: int) -> list[Windows]:
        """List the windows that an arm is evaluated on."""
        chooses = arm.choosing and seed == self.seeds[0]
        return [*([CHOOSING] if chooses else []), *([JUDGING] if seed in self.seeds[: arm.judged] else [])]

    def waves(self) -> list[list[tuple[Arm, int]]]:
        """Group (arm, seed) pairs into those that train and those that evaluate another arm's weights."""
        # The first seed of every arm comes first, so that a study that is cut short has every row.
        pairs = [(arm, seed) for seed in self.seeds for arm in ARMS if self.windows(arm, seed)]
        wanted = [(arm, seed) for arm, seed in pairs if self.only is None or arm.name in self.only]
        return [[pair for pair in wanted if (pair[0].weights_of is None) == trains] for trains in (True, False)]


def main() -> int:
    """Run the missing stages; return 1 if a stage failed (after trying the others), 2 for unusable input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="files of books, a glob that the corpus `local_books` can read")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--jobs", type=study_stages.at_least_one, default=2, help="parallel processes, of one thread each"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    names = [arm.name for arm in ARMS]
    only = "run only these arms; their names are in study_arms.py"
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=names, help=only)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of training; bf16 needs a CPU with it"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    study = Study(args.books, args.out, args.seeds, args.smoke, args.only, args.precision)
    os.chdir(ROOT)
    try:
        require_usable(study)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        corpus(study)
        train(study, study.base, "study_base", [])
        # Threads suffice: each one waits for a subprocess.
        with ThreadPoolExecutor(args.jobs) as pool:
            codes = [code for wave in study.waves() for code in pool.map(partial(run_arm, study), wave)]
            # Last, so that a study that is cut short has its arms: five methods on one set of weights take long.
            codes += pool.map(partial(evaluate_base, study), (CHOOSING, JUDGING))
    except subprocess.CalledProcessError as error:
        return study_stages.failed(error)
    except Interrupted as interrupt:
        return stages.ended(interrupt)
    print(write_tables(study))
    return int(any(codes))


def require_usable(study: Study) -> None:
    """Raise `ConfigError` if nothing can be written, or if the store is missing and there are no files to make it."""
    require_writable_folder("--out", study.out, study.out)
    try:
        if not study.store.exists():
            expand([study.books], Format.auto)
    except InputError as error:
        remedy = "name files that the corpus local_books can read, a glob in quotes"
        raise ConfigError("--books", study.books, f"{str(error).rpartition(': ')[2]}; {remedy}") from error


def write_tables(study: Study) -> str:
    """Write the record and the tables of the evaluations so far; return the tables."""
    return study_tables.write(study_record.collect(study.out, study.seeds), study.out / "report")


def corpus(study: Study) -> None:
    """Make the tokenizer and the token stores."""
    stage = partial(study_stages.run, study.out)
    # Of the 15 books that the share was chosen for, it holds out 5: their hashes are not spread evenly.
    books = ["+corpus=local_books", f"corpus.paths=[{study.books!r}]", "corpus.validation_share=0.55"]
    prepare, tokenizer = [sys.executable, "-m", "data_prep"], study.out / "tokenizer"
    stage(tokenizer, [*prepare, "train_tokenizer", *books, "vocab_size=2048", f"output={tokenizer}"])
    stage(study.store, [*prepare, "tokenize", *books, f"tokenizer={tokenizer}", f"output={study.store}"])
    text = study.out / "retrieval_text.jsonl.zst"
    room = [f"max_tokens={CONTEXT_LEN}", f"num_documents={200 if study.smoke else 50000}", KINDS]
    stage(text, [*prepare, "retrieval_text", *books, f"tokenizer={tokenizer}", *room, f"output={text}"])
    made = ["+corpus=retrieval_text", f"corpus.paths=[{str(text)!r}]", f"tokenizer={tokenizer}"]
    stage(study.retrieval, [*prepare, "tokenize", *made, f"output={study.retrieval}"])


def run_arm(study: Study, arm_and_seed: tuple[Arm, int]) -> int:
    """Train and evaluate one arm; return the exit code of the failed stage, or 0."""
    arm, seed = arm_and_seed
    own = study.out / arm.name / f"seed_{seed}"
    weights = study.out / (arm.weights_of or arm.name) / f"seed_{seed}"
    overrides = [f"model.path={study.base / 'final'}", f"seed={seed}", *arm.overrides]
    try:
        if arm.weights_of is None:
            train(study, own, "study_finetune", overrides)
        for windows in study.windows(arm, seed):
            evaluate(study, weights, arm.methods, own, windows, arm.evaluation)
    except subprocess.CalledProcessError as error:
        return study_stages.failed(error)
    return 0


def evaluate_base(study: Study, windows: Windows) -> int:
    """Evaluate the methods that need no training; return the exit code of the program."""
    try:
        evaluate(study, study.base, BASE_METHODS, study.base, windows)
    except subprocess.CalledProcessError as error:
        return study_stages.failed(error)
    return 0


def train(study: Study, run: Path, experiment: str, overrides: Iterable[str]) -> None:
    """Train one model in one process."""
    stores = [f"data.domains.books.path={study.store}", f"data.domains.retrieval.path={study.retrieval}"]
    command = [sys.executable, "train.py", f"+experiment={experiment}", *stores, f"engine.precision={study.precision}"]
    command += overrides
    study_stages.run(study.out, run / "final", [*command, f"output_dir={run}", *(SMOKE if study.smoke else [])])


def evaluate(
    study: Study, run: Path, methods: Iterable[str], folder: Path, windows: Windows, overrides: Iterable[str] = ()
) -> None:
    """Evaluate a run's final model with each method, at every length, into a folder's evaluations."""
    output = folder / "evaluation" / f"{windows.name}.json"
    # A smoke run shows that everything works together; its numbers mean nothing at any length.
    lengths, prompts = (LENGTHS[:2], PROMPT_LENGTHS[:2]) if study.smoke else (LENGTHS, PROMPT_LENGTHS)
    command = [sys.executable, "-m", "clex_train.cli.evaluate", f"run={run}", f"methods=[{','.join(methods)}]"]
    command += [f"lengths={lengths}".replace(" ", ""), f"task_lengths={prompts}".replace(" ", ""), *READINGS]
    if windows is JUDGING:
        distances = DISTANCES[:1] if study.smoke else DISTANCES
        command += ["measures=[forced_passkey,repetition]", f"distances={distances}".replace(" ", "")]
    else:
        command += ["measures=[forced_passkey]"]
    command += [f"data={study.store}", f"context_len={CONTEXT_LEN}"]
    command += [f"seed={windows.seed}", *overrides]
    numbers = ["num_windows=2", "num_prompts=1"] if study.smoke else ["num_windows=12", "num_prompts=8"]
    study_stages.run(study.out, output, [*command, *numbers, f"output={output}"])


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    sys.exit(main())
