"""Newest versions of the core libraries that the test suite has passed with, and a warning for each newer one.

Minor releases of transformers and DeepSpeed rename what others build on. `constraints.txt` pins the same versions for
an install from a clone; a test keeps the two in step. Nothing here imports a library, so every program may use it.
"""

import tomllib
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

from packaging.version import Version

from clex_train.utils.locations import IS_CHECKOUT, ROOT

OWN = "clex-train"
"""Name of this distribution."""

NEWEST_TESTED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "deepspeed": "0.19.8",
    "tokenizers": "0.23.3",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
}


class Optional(NamedTuple):
    """Package that nothing requires."""

    module: str
    """Import name."""
    use: str
    """Purpose, and how to install it, for messages."""


OPTIONAL = {
    "flash-attn": Optional("flash_attn", "faster attention and LM-Infinite's window on a GPU; clex-train[gpu]"),
    "liger-kernel": Optional("liger_kernel", "fused norms and MLPs on a GPU; clex-train[gpu]"),
    "triton": Optional("triton", "compiles the GPU kernels; comes with torch's CUDA wheels"),
    "gguf": Optional("gguf", "clex-train export format=gguf; clex-train[export]"),
    "tensorboard": Optional("tensorboard", "tracking=tensorboard; clex-train[tracking]"),
    "trackio": Optional("trackio", "tracking=trackio; clex-train[tracking]"),
    "peft": Optional("peft", "LoRA, train.py adapter=lora; clex-train[adapters]"),
    "lm-eval": Optional("lm_eval", "clex-train lm-eval; clex-train[eval]"),
}


def install_command(extra: str) -> str:
    """Return the command that installs an extra (`gpu`, `eval`, ...), for a checkout or for an installed package."""
    return f"pip install -r requirements-{extra}.txt" if IS_CHECKOUT else f"pip install '{OWN}[{extra}]'"


def missing() -> list[str]:
    """List the optional packages that are not installed."""
    return [name for name, optional in OPTIONAL.items() if find_spec(optional.module) is None]


def own() -> str:
    """Return the version of the running code."""
    project = ROOT / "pyproject.toml"
    if IS_CHECKOUT and project.is_file():
        # Installed metadata may belong to another wheel, or be as old as the last `pip install -e .`.
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return installed_version(OWN) or "unknown"


def installed_version(name: str) -> str | None:
    """Return the version of a distribution without its build label (`+cpu`); None when it is not installed."""
    try:
        # Builds of torch carry a local label (+cpu, +cu128), which would compare as newer than the plain release.
        return Version(metadata.version(name)).public
    except metadata.PackageNotFoundError:
        return None


def describe(name: str) -> str:
    """Describe the installed and the newest tested version, for errors."""
    return f"{name} {installed_version(name) or 'unknown'} is installed, {NEWEST_TESTED[name]} is the newest tested"


def untested_warnings() -> list[str]:
    """Return one line for each core library that is newer than any tested version."""
    return [
        _line(name, found) for name in NEWEST_TESTED if (found := installed_version(name)) and _is_newer(name, found)
    ]


def _is_newer(name: str, found: str) -> bool:
    # Parsed, since "0.9" > "0.19" as text.
    return Version(found) > Version(NEWEST_TESTED[name])


def _line(name: str, found: str) -> str:
    tested = NEWEST_TESTED[name]
    return f"{name} {found} is newer than {tested}, the newest tested; pip install {name}=={tested} if results surprise"
