"""Run a task inside a container: options for srun, or a prefix before the command. The code is mounted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clex_train.config.launch import Container, LaunchConfig


@dataclass(frozen=True)
class Entrance:
    """Options that make srun open the container, and words that go before the command of a task."""

    srun_options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


def entrance(launch: LaunchConfig, folders: Sequence[Path]) -> Entrance:
    """Return the entrance for a config, with `folders` mounted under their own names."""
    # Without duplicates: the job may be submitted from its run folder.
    mounts = [*dict.fromkeys(map(str, folders)), *launch.container_mounts]
    return ENTRANCES[launch.container](str(launch.container_image), mounts, str(folders[0]))


def _none(image: str, mounts: Sequence[str], workdir: str) -> Entrance:
    return Entrance()


def _pyxis(image: str, mounts: Sequence[str], workdir: str) -> Entrance:
    pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    return Entrance(
        srun_options=(f"--container-image={image}", f"--container-mounts={pairs}", f"--container-workdir={workdir}")
    )


def _apptainer(image: str, mounts: Sequence[str], workdir: str) -> Entrance:
    # Apptainer is started by each task, not by srun: it works without a plugin of SLURM.
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return Entrance(prefix=("apptainer", "exec", "--nv", *binds, "--pwd", workdir, image))


ENTRANCES: dict[Container, Callable[[str, Sequence[str], str], Entrance]] = {
    Container.none: _none,
    Container.pyxis: _pyxis,
    Container.apptainer: _apptainer,
}
