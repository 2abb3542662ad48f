"""Safe loading of checkpoints: no code from a file is ever run.

A pickle can name any function of any module. torch's `weights_only` unpickler refuses every name outside an allow list.
It is forced here on every `torch.load` of the process while a checkpoint is read, DeepSpeed's own calls included.
Checksums are no protection: an attacker who forges a file can forge its checksum.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clex_train.utils.errors import ConfigError, InputError, first_line

# torch says which name it refused only in the message of its UnpicklingError.
NOT_ALLOWED = re.compile(r"(?:GLOBAL|unrecognized function) ([^\s,]+)")
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class RunsCode(InputError):
    """A checkpoint file names a function outside the allow list. Nothing was called."""


def check(path: Path) -> str | None:
    """Scan a file's pickle without reading its tensors; return what is wrong with it, or None.

    Call it within `tensors_only`. Raises `RunsCode`, which names file and function.
    """
    try:
        # mmap leaves the storages on disk, so that a file of many GiB is scanned in milliseconds.
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if named := NOT_ALLOWED.search(str(error)):
            raise RunsCode(f"checkpoint file {path}: refused, it would call {named[1]}; nothing was run") from error
        return f"{path.name} does not contain tensors"
    except Exception as error:  # a damaged archive makes zipfile, pickle and torch raise almost anything
        return f"{path.name} cannot be read ({first_line(error)[:80]})"
    return None


@contextmanager
def tensors_only(what: Path) -> Iterator[None]:
    """Restrict `torch.load` to tensors, plain values and DeepSpeed's own classes, in child processes too.

    Raises `RunsCode` when a file of `what` needs more, and `ConfigError` when a tensor's bytes are damaged.
    """
    # DeepSpeed calls torch.load with weights_only=False, and only these variables override an explicit argument.
    # torch raises if both are set.
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise RunsCode(f"checkpoint {what}: refused, {first_line(error)[:120]}; nothing was run") from error
    except RuntimeError as error:
        # The archive's own CRC of a tensor is verified when the tensor is read, which `check` does not do.
        if "PytorchStreamReader" not in str(error):
            raise
        raise ConfigError(
            f"checkpoint {what}", None, f"damaged ({first_line(error)[:120]}); remove it and resume"
        ) from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes() -> list[Any]:
    """List the classes that DeepSpeed pickles with its tensors; unpickling them has no side effects."""
    # Imported here: importing deepspeed takes seconds, and `check` is also used by programs that never train.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
