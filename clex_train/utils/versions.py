"""Newest versions of the core libraries that the test suite has passed with, and a warning for each newer one.

Minor releases of transformers and DeepSpeed rename what others build on. `constraints.txt` pins the same versions for
an install from a clone; a test keeps the two in step. Nothing here imports a library, so every program may use it.
"""

from importlib import metadata

from packaging.version import Version

NEWEST_TESTED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "deepspeed": "0.19.8",
    "tokenizers": "0.23.3",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
}


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
