"""Tasks of lm-eval with their data, found and loaded before any weights."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clex_train.utils.errors import ConfigError
from clex_train.utils.versions import install_command


def require_installed() -> None:
    """Raise `ConfigError` with the remedy when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed", None, install_command("eval"))


class Tasks:
    """Tasks with their data, loaded before any weights.

    Args:
        names: tasks or patterns (`longbench_*`).
        include: folder with the user's own task files.
        metadata: parameters of tasks (RULER: `max_seq_lengths`, and the `tokenizer` that counts them).

    Raises `ConfigError` for an unknown name, or when the data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], include: Path | None, metadata: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        # At level INFO, it logs every task file that it skips.
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.manager = TaskManager(include_path=include, metadata=dict(metadata))
        for name in names:
            if not self.manager.match_tasks([name]):
                raise ConfigError(
                    "tasks",
                    f"[{name}]",
                    "lm-eval has no such task; `lm-eval ls tasks` lists them, and include=FOLDER "
                    "adds task files of your own",
                )
        self.names = self.manager.match_tasks(list(names))
        self.loaded = _load(self.manager, self.names)

    def load(self, _: object) -> Any:
        """Return the tasks loaded on creation; replaces the method of the harness's task manager."""
        return self.loaded


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError("tasks", f"[{','.join(names)}]", f"a package is missing ({reason})") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            "tasks",
            f"[{','.join(names)}]",
            f"their data cannot be read ({reason}); without a network, fill the cache of "
            "datasets (HF_HOME) on a machine that has one",
        ) from error
