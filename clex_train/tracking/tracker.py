"""Where figures go: metrics.jsonl always, a live bar on the console, wandb if asked for; all on rank 0 only."""

import json
import math
import netrc
import os
import platform
import re
import secrets
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from clex_train.config.checkpoint import OnFullDisk
from clex_train.config.root import Config
from clex_train.config.tracking import TrackingConfig, Wandb
from clex_train.tracking.metrics_log import MetricsLog
from clex_train.utils import distributed, files, log, progress
from clex_train.utils.bounds import require

logger = log.get(__name__)

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "torchdiffeq", "hydra-core", "flash-attn")

MOST_ID = 256
"""Bytes of the file with a run's id at wandb."""
WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
CLOUDS = ("api.wandb.ai", "api.forge.coreweave.com")

COLUMNS = ["step", "measure", "method", "protocol", "length", "value"]
"""Of the table of an evaluation; tasks have no protocol."""


class Tracker:
    """Opened once per run: `step` for every optimizer step, `evaluation` for a set of perplexities, `close`."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self.log_every = config.tracking.log_every
        self.active = distributed.is_main()
        self.fault: str | None = None
        """On rank 0, why the run has to stop: its figures find no room, and it may not go on without them."""
        self._goes_on = config.checkpoint.on_full_disk is OnFullDisk["continue"]
        distributed.write_on_main(lambda: self._open(config, run_dir, first_step))
        if not self.active:
            return
        self._evaluated = evaluated_steps(self._log.rows)
        self._wandb = _open_wandb(config, run_dir, self._run_id)
        self._bar = progress.bar(config.optim.steps, config.name, initial=first_step, unit="step")

    def _open(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._log = MetricsLog(run_dir / "metrics.jsonl", first_step)
        self._run_id = "" if config.tracking.wandb is Wandb.off else _wandb_id(run_dir / "wandb_id")

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step: the bar always moves; every `log_every` steps a line is written."""
        if not self.active:
            return
        self._bar.update(1)
        self._bar.set_postfix_str(_postfix(metrics), refresh=False)
        if metrics["step"] % self.log_every == 0 or metrics["step"] == self._bar.total:
            self._write(metrics)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has no evaluation of this step yet; every rank gets the same answer. Collective."""
        return bool(distributed.broadcast_object(self.active and step not in self._evaluated))

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Record perplexities as `perplexity/<method>/<protocol>/<length>`, retrieval as `<task>/<method>/<length>`."""
        if not self.active:
            return
        self._write({"step": step, **results})
        self._sync()
        self._evaluated.add(step)
        if self._wandb is not None:
            self._wandb.evaluation(step, results)

    def saved(self, step: int, seconds: float) -> None:
        """Record that a checkpoint of this step was begun or written, and how long training waited for it."""
        if not self.active:
            return
        self._write({"step": step, "save_seconds": seconds})
        self._sync()
        logger.info("step %d: training waited %.2f s for its checkpoint", step, seconds)

    def roll_back(self, step: int) -> None:
        """Forget what came after `step`: it is going to be taken again. Collective."""
        distributed.write_on_main(lambda: self._log.cut_back(step))
        if not self.active:
            return
        self._evaluated = evaluated_steps(self._log.rows)
        self._bar.update(step - self._bar.n)

    def close(self, finished: bool = True) -> None:
        """Flush and close whatever is open; wandb hears whether the run came to its end."""
        if not self.active:
            return
        self._bar.close()
        self._log.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)

    def _write(self, line: dict[str, Any]) -> None:
        # What is still on the device is waited for here, in the steps that are written and in no other.
        line = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in line.items()}
        # JSON has no word for a number that is not finite.
        known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        before = self._log.failure
        self._log.append(known)
        self._note(before)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in line.items() if not isinstance(value, list)})

    def _sync(self) -> None:
        before = self._log.failure
        self._log.sync()
        self._note(before)

    def _note(self, before: OSError | None) -> None:
        """Say once that the log finds no room, and whether the run may go on."""
        failure = self._log.failure
        why = distributed.unwritten(failure) if failure else None
        self.fault = None if self._goes_on else why
        if why and self._goes_on and before is None:
            logger.error("%s; its lines wait in memory, training goes on (checkpoint.on_full_disk=continue)", why)


class WandbRun:
    """A run of wandb: figures step by step, evaluations also as a table and as curves against length."""

    def __init__(self, module: Any, run: Any) -> None:
        self._module, self._run = module, run

    def log(self, line: dict[str, Any]) -> None:
        """Figures of a step, `step` among them."""
        self._run.log(line)

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """`evaluation/table` with a row a key, and `evaluation/<measure>` with a line for each method."""
        rows = evaluation_rows(step, results)
        charts = {f"evaluation/{measure}": self._chart(measure, rows) for measure in dict.fromkeys(r[1] for r in rows)}
        self._run.log({"step": step, "evaluation/table": self._module.Table(columns=COLUMNS, data=rows), **charts})

    def finish(self, exit_code: int) -> None:
        """The end; another code than 0 marks the run as failed."""
        self._run.finish(exit_code=exit_code)

    def _chart(self, measure: str, rows: list[list[Any]]) -> Any:
        lines: dict[str, list[tuple[int, float]]] = {}
        for _, _, method, protocol, length, value in (row for row in rows if row[1] == measure):
            lines.setdefault(f"{method}, {protocol}" if protocol else method, []).append((length, value))
        points = [sorted(line) for line in lines.values()]
        xs, ys = ([[point[i] for point in line] for line in points] for i in (0, 1))
        return self._module.plot.line_series(xs, ys, keys=list(lines), title=measure, xname="length in tokens")


def require_login(tracking: TrackingConfig) -> None:
    """`ValueError` on rank 0 if wandb is to be online and nobody is logged in; asks nobody and connects to nothing."""
    if tracking.wandb is not Wandb.online or not distributed.is_main():
        return
    import wandb

    settings = wandb.setup().settings
    known = bool(settings.api_key or getattr(settings, "identity_token_file", None))
    require(
        known or _in_netrc(urlsplit(settings.base_url).netloc),
        "tracking.wandb",
        tracking.wandb.value,
        "nobody is logged in to wandb here; run `wandb login`, set WANDB_API_KEY, or take tracking=offline",
    )


def _in_netrc(host: str) -> bool:
    """Return True if a netrc file, which `wandb login` writes, has a login for the host or its other name."""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(file.expanduser())
            if logins.authenticators(host) or (host in CLOUDS and any(map(logins.authenticators, CLOUDS))):
                return True
    return False


def evaluation_rows(step: int, results: dict[str, float]) -> list[list[Any]]:
    """A row of `COLUMNS` for each key of an evaluation; values that are not finite are left out."""
    rows: list[list[Any]] = []
    for key, value in results.items():
        measure, method, *protocol, length = key.split("/")
        if math.isfinite(value):
            rows.append([step, measure, method, "".join(protocol), int(length), value])
    return rows


def evaluated_steps(rows: list[dict[str, Any]]) -> set[int]:
    """List the steps whose evaluations are among the rows of metrics.jsonl."""
    return {row["step"] for row in rows if any(is_evaluation(key) for key in row)}


def is_evaluation(key: str) -> bool:
    """Whether a key of metrics.jsonl belongs to an evaluation: perplexity or a retrieval task, method, ..., length."""
    return key.count("/") >= 2


def write_environment(run_dir: Path, first_step: int, data_fingerprint: str) -> None:
    """environment.json, and environment_step_<N>.json for each resumption at step N.

    They hold the command, the commit, versions, the machine and the fingerprint of the data.
    """
    facts = {
        # As typed: console.run has rewritten sys.argv, where texts are quoted for Hydra.
        "command": [sys.executable, *sys.orig_argv[1:]],
        "git_commit": git_commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "world_size": distributed.world_size(),
        "data_fingerprint": data_fingerprint,
    }
    name = f"environment_step_{first_step}.json" if first_step else "environment.json"
    files.write_atomically(run_dir / name, json.dumps(facts, indent=2) + "\n")


def git_commit() -> str | None:
    """Commit of the checkout this program runs from, with `-dirty` if files differ; None outside git.

    A snapshot of a checkout (`python -m launch.slurm`) has it in a file named COMMIT.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text(encoding="utf-8").strip() or None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _postfix(metrics: dict[str, Any]) -> str:
    text = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
    return text + (f"  t {metrics['t']:.1f}" if "t" in metrics else "")


def _open_wandb(config: Config, run_dir: Path, run_id: str) -> WandbRun | None:
    if config.tracking.wandb is Wandb.off:
        return None
    import wandb

    run = wandb.init(
        project=config.tracking.project,
        name=config.name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        mode=config.tracking.wandb.value,
        settings=wandb.Settings(console="off", silent=True),
    )
    # Steps after the last checkpoint are taken again on resume: wandb's own counter cannot go back, ours can.
    run.define_metric("*", step_metric="step")
    return WandbRun(wandb, run)


def _wandb_id(path: Path) -> str:
    """Return the id of the run at wandb; a new one where there is none, or what is left of it is damaged."""
    if path.exists():
        with suppress(files.BadFile):
            content = files.read_regular(path, within=path.parent, most=MOST_ID).decode("utf-8", "replace")
            if known := WANDB_ID.fullmatch(content.strip()):
                return known[0]
        logger.warning("%s: damaged, kept as %s; the run begins anew at wandb", path, files.set_aside(path).name)
    run_id = secrets.token_hex(4)
    # Durable before wandb hears of it: a run that is killed here must find its own wandb run again.
    files.write_atomically(path, run_id + "\n")
    return run_id
