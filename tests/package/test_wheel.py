"""The built wheel: complete, and its programs run from a folder outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the wheel without network and unpack it as `pip install` would."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=600,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def program(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `clex-train` out of the unpacked wheel in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, "-m", "clex_train.cli.main", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_every_file_that_programs_read_is_in_the_wheel(site: Path) -> None:
    shipped = site / "clex_train" / "shipped"
    own = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*") if path.is_file()}
    assert own == {str(path.relative_to(shipped / "conf")) for path in (shipped / "conf").rglob("*") if path.is_file()}
    assert (shipped / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert {path.name for path in (site / "launch" / "job").iterdir()} == {
        path.name for path in (ROOT / "launch" / "job").glob("*.sh")
    }
    assert not list(site.rglob("quickstart.py")), "works on a checkout only"


def test_metadata_has_the_dependencies_and_extras_of_the_requirements(site: Path) -> None:
    (metadata,) = site.glob("clex_train-*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Requires-Dist: torch==" in text
    assert "License-File: LICENSE" in text
    assert {f"Provides-Extra: {extra}" for extra in ("gpu", "eval", "export", "dev")} <= set(text.splitlines())


def test_info_names_the_commit_that_the_wheel_was_built_from(site: Path, tmp_path: Path) -> None:
    done = program(site, tmp_path, "info")
    assert done.returncode == 0, done.stderr
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert head.stdout.strip() in done.stdout
    assert str(site) in done.stdout.splitlines()[0]


def test_a_run_is_planned_with_the_shipped_configuration(site: Path, tmp_path: Path) -> None:
    done = program(site, tmp_path, "dry-run", "+experiment=tiny_base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan of tiny_base")


def test_a_mistake_is_reported_in_one_line_with_exit_code_2(site: Path, tmp_path: Path) -> None:
    done = program(site, tmp_path, "train", "+experiment=tiny_base", "optim.lrr=1")
    assert (done.returncode, done.stderr) == (2, "error: optim.lrr: no such key; did you mean optim.lr?\n")


def test_a_slurm_job_gets_the_layout_of_a_checkout(site: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from launch import snapshot; snapshot.copy_code(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code, "code"], cwd=tmp_path, env=environment, check=True, timeout=600)
    copied = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*")}
    assert {"train.py", "conf/config.yaml", "clex_train/training/loop.py", "data_prep/__main__.py", "COMMIT"} <= copied
    assert "clex_train/shipped" not in copied, "the copy would look for its files there"
    assert (tmp_path / "code" / "COMMIT").read_text() == (site / "clex_train" / "shipped" / "COMMIT").read_text()


@pytest.mark.slow
def test_every_stage_from_text_to_report_works_from_the_wheel(site: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for source in [*Path(os.__file__).parent.glob("json/*.py"), *Path(os.__file__).parent.glob("email/*.py")]:
        (texts / f"{source.parent.name}_{source.stem}.txt").write_text(source.read_text(encoding="utf-8"))
    corpus = ("+corpus=folder", "corpus.paths=[texts]", "corpus.name=tiny")
    data = ("data.path=store", "evaluation.lengths=[128,256]", "evaluation.num_windows=2", "optim.batch_rows=4")
    model = (
        "+experiment=tiny_clex",
        "model.path=null",
        "model.init=random",
        "engine.micro_batch=2",
        "scaling.log_scale=off",
    )
    for arguments in (
        ("prepare", "train_tokenizer", *corpus, "output=tokenizer", "vocab_size=512"),
        ("prepare", "tokenize", *corpus, "corpus.validation_share=0.2", "tokenizer=tokenizer", "output=store"),
        ("train", *model, *data, "output_dir=run", "optim.steps=2", "tracking.wandb=off"),
        ("evaluate", "run=run", "methods=[trained]", "lengths=[128]", "num_windows=2"),
        ("report", "run"),
        ("export", "run=run", "format=official", "output=exported"),
        ("slurm", "--dry-run", *model, *data, "output_dir=job", "launch=cpu"),
    ):
        done = program(site, tmp_path, *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert (tmp_path / "exported" / "config.json").is_file()
    assert "#SBATCH" in done.stdout
