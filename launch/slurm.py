"""Submit a training run to SLURM, which requeues and resumes it until it is finished.

    python -m launch.slurm +experiment=llama2_7b_clex launch.nodes=4 launch.gpus_per_node=8 launch.time=24:00:00
    python -m launch.slurm --dry-run launch=h100_infiniband ...        prints the job script, submits nothing
    python -m launch.slurm launch=task_per_rank launch.partition=long launch.account=me ...

Takes every key of train.py and those of `launch`. The complete config is checked first. Then code, config and script
are written to a new directory in the run folder, and the job runs from there, unaffected by later edits. See
docs/slurm.md.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from hydra import compose, initialize_config_dir

from clex_train.config import root as configuration
from clex_train.config.docs import describe
from clex_train.config.launch import LaunchConfig
from clex_train.config.root import Config, Resume
from clex_train.console import config_files, program
from clex_train.console.overrides import for_hydra
from clex_train.preflight.run_checks import Scope, run_checks
from clex_train.tracking import run_folder
from clex_train.utils import files, log
from clex_train.utils.errors import ConfigError, InputError, require
from clex_train.utils.locations import CONF
from launch import job_script, snapshot

DRY_RUN = "--dry-run"
SBATCH_TIMEOUT = 120.0
"""Seconds; a busy controller answers late, and a job may be queued although sbatch was killed."""


def main() -> None:
    """Check the config, then print the script or submit the job."""
    overrides = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    config = composed(overrides)
    if DRY_RUN in sys.argv[1:]:
        check(config, Scope.plan)
        print(job_script.render(config, submission_folder(config), Path.cwd()))
    else:
        submit(config)


def composed(overrides: Sequence[str]) -> Config:
    """Return the checked config that train.py would compose from the same arguments."""
    for word in overrides:
        require(not word.startswith("-"), "argument", word, f"give key=value, or {DRY_RUN}; --help lists the keys")
    configuration.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = for_hydra(Config, overrides)
        config = configuration.to_config(compose("config", overrides=words))
        hydra = compose("config", overrides=[*words, "hydra.runtime.output_dir=."], return_hydra_config=True).hydra
        config_files.require_texts(Config, hydra)
        return config


def check(config: Config, scope: Scope) -> None:
    """Check everything that train.py would refuse on the nodes, and that the run can be a job.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    run_checks(config, scope)
    require(not config.dry_run, "dry_run", True, f"would be submitted as a job; use {DRY_RUN} to see the script here")
    require(
        config.resume is not Resume.never or config.launch.max_restarts == 0,
        "resume",
        config.resume.name,
        "a requeued job has to resume; set resume=auto or launch.max_restarts=0",
    )


def submit(config: Config) -> None:
    """Check, write the submission and pass it to sbatch; raise `ConfigError` with sbatch's message if it is refused."""
    check(config, Scope.submission)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch", None, "not installed here; submit from a login node of the cluster, or use --dry-run"
        )
    folder = submission_folder(config)
    # A refused submission must not leave an empty run folder, which a later run would take for its own.
    with run_folder.left_as_found(Path(config.output_dir)), run_folder.left_as_found(folder.parent):
        run_folder.require_writable(Path(config.output_dir))
        write(config, folder)
        try:
            job_id = _sbatch(folder / job_script.NAME)
        except InputError:
            # Otherwise every refused attempt would leave a copy of the code behind.
            shutil.rmtree(folder)
            raise
    print(f"job {job_id} submitted; its log: {job_script.log_file(Path(config.output_dir))}")
    print(f"script, config and code: {folder}")


def write(config: Config, folder: Path) -> None:
    """Write the submission: `code/`, `config.yaml` as train.py will read it, and the script."""
    with files.atomic_directory(folder) as unfinished:
        snapshot.copy_code(unfinished / job_script.CODE)
        files.write_atomically(unfinished / "config.yaml", job_script.configuration_text(config, folder))
        files.write_atomically(unfinished / job_script.NAME, job_script.render(config, folder, Path.cwd()))


def submission_folder(config: Config) -> Path:
    """Return the path (absolute) of a new submission directory."""
    # The time sorts submissions; the counter separates those within one second.
    parent = Path(config.output_dir).absolute() / "launch"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (stamp if i == 0 else f"{stamp}-{i}" for i in range(1000))
    return next(parent / name for name in names if not (parent / name).exists())


def usage() -> str:
    """Return the help text: this module's docstring and a line per key of `launch`."""
    rows = describe(LaunchConfig, "launch.")
    keys = [f"  {key}={default}  ({kind})\n      {meaning.replace('`', '')}" for key, kind, default, meaning in rows]
    return f"{__doc__}\nKeys of launch; `python train.py --help` lists the others\n" + "\n".join(keys)


def _sbatch(script: Path) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=SBATCH_TIMEOUT, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ConfigError("sbatch refuses the job", None, f"{reason}; change the launch keys")
    # Federated clusters append ;cluster.
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="squeue shows whether the job was submitted"))
