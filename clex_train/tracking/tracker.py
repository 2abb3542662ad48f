"""Metric logging on rank 0: metrics.jsonl, a progress bar on the console, and the back end of `tracking`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clex_train.config.checkpoint import OnFullDisk
from clex_train.tracking.back_ends import LIBRARIES
from clex_train.tracking.evaluations import evaluation_rows, is_evaluation
from clex_train.tracking.metrics_log import MetricsLog
from clex_train.utils import distributed, log, progress

if TYPE_CHECKING:
    from clex_train.config.root import Config

logger = log.get(__name__)


class Tracker:
    """Records a run's metrics. Create it once per run on every rank; other ranks than 0 record nothing."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self.log_every = config.tracking.log_every
        self.active = distributed.is_main()
        self.fault: str | None = None
        """On rank 0, the reason to stop the run: the log cannot be written, and the run may not continue without."""
        self._goes_on = config.checkpoint.on_full_disk is OnFullDisk["continue"]
        self._evaluated: set[int] = set()
        # Collective, so that a failure on rank 0 stops the other ranks instead of hanging them.
        distributed.write_on_main(lambda: self._open(config, run_dir, first_step))
        if not self.active:
            return
        self._bar = progress.bar(config.optim.steps, config.name, initial=first_step, unit="step")

    def _open(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._log = MetricsLog(run_dir / "metrics.jsonl", first_step, self._see)
        library = LIBRARIES.get(config.tracking.back_end)
        self._shown = library.open_run(config, run_dir, first_step) if library else None

    def step(self, metrics: dict[str, Any]) -> None:
        """Record an optimizer step: advance the bar, and log a line every `log_every` steps."""
        if not self.active:
            return
        self._bar.update(1)
        self._bar.set_postfix_str(_postfix(metrics), refresh=False)
        # The last step is always logged, at any interval.
        if metrics["step"] % self.log_every == 0 or metrics["step"] == self._bar.total:
            self._write(metrics)

    def lacks_evaluation(self, step: int) -> bool:
        """Return True if metrics.jsonl still lacks an evaluation of this step. Collective; the same on every rank."""
        # A run that was killed between its checkpoint and the evaluation of the same step owes it on resume.
        return bool(distributed.broadcast_object(self.active and step not in self._evaluated))

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Record evaluation results.

        Keys are `perplexity/<method>/<protocol>/<length>` and `<task>/<method>/<length>`.
        """
        if not self.active:
            return
        self._write({"step": step, **results})
        self._sync()
        self._evaluated.add(step)
        if self._shown is not None:
            self._shown.evaluation(step, evaluation_rows(step, results))

    def saved(self, step: int, seconds: float) -> None:
        """Record the seconds that training waited for the checkpoint of this step."""
        if not self.active:
            return
        self._write({"step": step, "save_seconds": seconds})
        self._sync()
        logger.info("step %d: training waited %.2f s for its checkpoint", step, seconds)

    def roll_back(self, step: int) -> None:
        """Drop everything logged after `step`, from which training continues. Collective."""
        self._evaluated = set()
        distributed.write_on_main(lambda: self._log.cut_back(step))
        if not self.active:
            return
        self._bar.update(step - self._bar.n)

    def close(self, finished: bool = True) -> None:
        """Flush and close the log, the bar and the back end, which marks an unfinished run as failed."""
        if not self.active:
            return
        self._bar.close()
        self._log.close()
        if self._shown is not None:
            self._shown.finish(exit_code=0 if finished else 1)

    def _see(self, row: dict[str, Any]) -> None:
        """Note an evaluation among the rows of metrics.jsonl."""
        if any(is_evaluation(key) for key in row):
            self._evaluated.add(row["step"])

    def _write(self, line: dict[str, Any]) -> None:
        # Reading a device tensor synchronizes, so it is done only in the steps that are logged.
        line = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in line.items()}
        # JSON has no NaN or infinity; null keeps the line readable by any parser.
        known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        before = self._log.failure
        self._log.append(known)
        self._note(before)
        # No back end plots lists, such as the spans of rows.
        if self._shown is not None:
            self._shown.log({key: value for key, value in line.items() if not isinstance(value, list)})

    def _sync(self) -> None:
        before = self._log.failure
        self._log.sync()
        self._note(before)

    def _note(self, before: OSError | None) -> None:
        """Update `fault` after a write, and log once when the log cannot be written but training continues."""
        failure = self._log.failure
        why = distributed.describe_write_error(failure) if failure else None
        self.fault = None if self._goes_on else why
        if why and self._goes_on and before is None:
            logger.error("%s; its lines wait in memory, training continues (checkpoint.on_full_disk=continue)", why)


def _postfix(metrics: dict[str, Any]) -> str:
    text = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
    text += f"  mfu {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    return text + (f"  t {metrics['t']:.1f}" if "t" in metrics else "")
