"""Tasks of lm-eval with their data, found and loaded before any weights."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clex_train.utils.errors import ConfigError, require
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
        alone: take the tasks of `include` only, not those of lm-eval.

    Raises `ConfigError` for an unknown name, or when the data cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], include: Path | None, metadata: Mapping[str, Any], alone: bool = False
    ) -> None:
        from lm_eval.tasks import TaskManager

        # At level INFO, it logs every task file that it skips.
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        # Without lm-eval's own 14,000 task files, the index takes no time.
        others = {"include_defaults": False} if alone else {}
        self.manager = TaskManager(include_path=include, metadata=dict(metadata), **others)
        remedy = "lm-eval has no such task; `lm-eval ls tasks` lists them, and include=FOLDER adds task files of yours"
        if alone:
            remedy = f"{include} has no such task; it has {', '.join(self.manager.all_subtasks)}"
        for name in names:
            if not self.manager.match_tasks([name]):
                raise ConfigError("tasks", f"[{name}]", remedy)
        self.names = self.manager.match_tasks(list(names))
        self.loaded = _load(self.manager, self.names)

    @property
    def single(self) -> list[str]:
        """Names of the tasks, with those of named groups."""
        return [*self.loaded["tasks"]]

    def select(self, task: str) -> None:
        """Let the harness's task manager return this task alone, as it was loaded on creation."""
        # `simple_evaluate` would read the data again.
        chosen = {"tasks": {task: self.loaded["tasks"][task]}, "groups": {}, "group_map": {}}
        self.manager.load = lambda _: chosen

    def answer_len(self, task: str, default: int) -> int:
        """Return the most tokens of an answer: those that are generated, or `default` for choices."""
        given = getattr(self.loaded["tasks"][task].config, "generation_kwargs", None) or {}
        return int(given.get("max_gen_toks", default))

    def require_room(self, max_length: int, max_prompt: int | None, template_len: int) -> None:
        """Raise `ConfigError` for lengths that leave no room for prompt and answer of a task."""
        for task in self.single:
            more = self.answer_len(task, 0) + template_len
            remedy = f"{task} answers with up to {more} tokens, a chat template included; set a greater length"
            require(max_length > more + 1, "max_length", max_length, remedy)
            most = max_length - more
            remedy = f"{task} has {most} tokens, max_length={max_length} less answer and template; set no more"
            require(max_prompt is None or max_prompt <= most, "max_prompt", max_prompt, remedy)

    def aggregate(self, by_task: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the harness's own scores of the named groups from those of their tasks."""
        groups = self.loaded.get("groups") or {}
        return {name: group.aggregate(by_task) for name, group in groups.items() if group.has_aggregation}


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
