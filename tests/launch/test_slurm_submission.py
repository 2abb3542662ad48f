"""The command `python -m launch.slurm` with a stand-in for sbatch: files, output and refusals."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from clex_train.console import program as console
from clex_train.token_store import vocabulary
from clex_train.tracking.environment import git_commit
from launch import slurm, snapshot

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path, tiny_store, tiny_architecture, monkeypatch, capsys):
    """Return a function that runs the launcher in an empty folder; `sbatch` is a script of the test, or missing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for needed in ("git", "bash"):
        (programs / needed).symlink_to(str(shutil.which(needed)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(programs))
    model = (f"model.config={tiny_architecture}", f"data.path={tiny_store}", "model.context_len=32")
    words = ("+experiment=tiny_base", *model, "data.seq_len=32", "evaluation.lengths=[32,64]", "output_dir=run")

    def run(*overrides: str, sbatch: str | None = "echo 42") -> Done:
        if sbatch is not None:
            (programs / "sbatch").write_text(f'#!{programs}/bash\necho "$@" >{tmp_path}/sbatch_arguments\n{sbatch}\n')
            (programs / "sbatch").chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["launch.slurm", *words, "launch=cpu", *overrides])
        code = console.run(slurm.main, slurm.usage)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def test_a_submission_has_script_configuration_and_code_and_is_passed_to_sbatch(command, tmp_path):
    done = command()
    assert done.returncode == 0, done.stderr
    assert "job 42 submitted" in done.stdout
    (folder,) = (tmp_path / "run" / "launch").iterdir()
    assert {path.name for path in folder.iterdir()} == {"job.sh", "config.yaml", "code"}
    assert (tmp_path / "sbatch_arguments").read_text().split() == ["--parsable", str(folder / "job.sh")]
    assert (folder / "code" / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert (folder / "code" / "conf" / "config.yaml").exists()


def test_a_dry_run_prints_the_script_and_writes_nothing(command, tmp_path):
    done = command("--dry-run", sbatch=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=1" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("launch.nodes=3",), "optim.batch_rows=8: must be a multiple of"),
        (("launch.nodez=3",), "launch.nodez: no such key; did you mean launch.nodes?"),
        (("launch=slurmy",), "launch=slurmy: no such option; take one of"),
        (("data.path=nowhere",), "data.path=nowhere"),
        (("output_dir=/proc/run",), "output_dir=/proc/run: cannot be written"),
        (("-m", "seed=1,2"), "argument=-m: give key=value, or --dry-run"),
        (("resume=never",), "resume=never: a requeued job has to resume"),
        (("evaluation.protocols=[streaming]",), "evaluation.protocols=['streaming']: streaming reads one long text"),
        (("dry_run=true",), "dry_run=True: would be submitted as a job; use --dry-run to see the script"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_no_files(command, tmp_path, overrides, message):
    done = command(*overrides)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "sbatch_arguments").exists()
    assert not (tmp_path / "run").exists()


def test_held_out_ids_outside_the_embedding_are_refused_as_in_training(command, tmp_path, tiny_store, monkeypatch):
    """Use a store whose training documents have no such ids."""
    monkeypatch.setattr(vocabulary, "check_embedding", lambda *_: None)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    done = command("model.path=base", f"evaluation.path={tiny_store}")
    assert done.returncode == 2
    line = rf"error: evaluation\.path={tiny_store}: it has the id \d+, but the embedding of base has 300 rows"
    assert re.search(line, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_sbatch_is_reported_with_a_remedy(command, tmp_path):
    done = command(sbatch=None)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch: not installed here; submit from a login node")
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_sbatch_is_quoted_and_the_submission_removed(command, tmp_path):
    refusal = "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1"
    done = command("launch.partition=nope", sbatch=refusal)
    assert done.returncode == 2
    assert done.stderr == ("error: sbatch refuses the job: invalid partition specified: nope; change the launch keys\n")
    assert not (tmp_path / "run").exists()


def test_a_snapshot_without_git_has_the_programs_and_no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_known_to_git", lambda: None)
    snapshot.copy_code(tmp_path / "code")
    copied = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*") if path.is_file()}
    assert {"train.py", "clex_train/training/loop.py", "conf/config.yaml", "launch/job/signals.sh", "COMMIT"} <= copied
    assert not any("__pycache__" in name for name in copied)
    program = (
        "import train; from clex_train.tracking.environment import git_commit; print(train.__file__, git_commit())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "code", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "code" / "train.py"), str(git_commit())], "its own code and commit"


def test_a_snapshot_by_git_has_new_files_and_no_ignored_ones(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "runs").mkdir(parents=True)
    for name in ("train.py", "new.py", "runs/weights.bin", "deleted.py"):
        (checkout / name).write_text(json.dumps(name))
    (checkout / ".gitignore").write_text("runs/\n")
    for words in (["init", "-q"], ["add", "train.py", ".gitignore", "deleted.py"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    (checkout / "deleted.py").unlink()
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    snapshot.copy_code(tmp_path / "code")
    assert {path.name for path in (tmp_path / "code").iterdir()} == {".gitignore", "COMMIT", "new.py", "train.py"}


def test_data_and_secrets_in_the_checkout_are_excluded_and_reported(tmp_path, monkeypatch, caplog):
    checkout = tmp_path / "checkout"
    for name in ("data", "conf", "mine"):
        (checkout / name).mkdir(parents=True)
    files = [
        "train.py",
        ".env",
        "conf/new.yaml",
        "conf/token.key",
        "data/notes.txt",
        "mine/code.py",
        "conf/weights.bin",
    ]
    for name in files:
        (checkout / name).write_text(name)
    (checkout / "large.json").write_bytes(b"x" * (snapshot.MOST_BYTES + 1))
    for words in (["init", "-q"], ["add", "train.py", ".env"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    snapshot.copy_code(tmp_path / "code")
    copied = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*") if path.is_file()}
    assert copied == {"train.py", "conf/new.yaml", "COMMIT"}, "also a secret that git tracks stays where it is"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "(6 files, 1.0 MB; secrets, data" in line
    assert ".env" in line


def test_an_exit_code_is_recorded_by_the_first_rank_that_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_TRAIN_EXIT_CODE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def refuse() -> None:
        raise ValueError("x=1: not so")

    monkeypatch.setattr("clex_train.console.errors.explain", str)
    assert console.run(refuse, str) == 2
    assert console.run(lambda: None, str) == 0
    assert (tmp_path / "code").read_text() == "2\n"


def test_help_names_every_key_of_the_group(command):
    done = command("--help")
    assert done.returncode == 0
    assert "launch.max_restarts=20" in done.stdout
