"""Reading a checkpoint never runs code from it, whoever made it.

A pickle can name any function of any module. torch's `weights_only` reader refuses every name that is not listed; it
is forced here on every `torch.load` of the process while a checkpoint is read, DeepSpeed's among them, and the few
classes that DeepSpeed puts beside its tensors are listed. A checksum would not protect: who makes a file makes its sum.
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

NOT_ALLOWED = re.compile(r"(?:GLOBAL|unrecognized function) ([^\s,]+)")
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class RunsCode(InputError):
    """A file of a checkpoint asks for a function that no checkpoint of ours has; none was called."""


def check(path: Path) -> str | None:
    """Look through a file's records without reading its tensors; what is wrong with it, or None.

    Raises `RunsCode`, naming file and function, when it would run code. Call it within `without_code`.
    """
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if named := NOT_ALLOWED.search(str(error)):
            raise RunsCode(f"checkpoint file {path}: refused, it would call {named[1]}; nothing was run") from error
        return f"{path.name} is not a record of tensors"
    except Exception as error:  # whatever a damaged archive makes zipfile, pickle and torch raise
        return f"{path.name} cannot be read ({first_line(error)[:80]})"
    return None


@contextmanager
def without_code(what: Path) -> Iterator[None]:
    """Within, `torch.load` reads tensors, plain values and DeepSpeed's own classes only; child processes too.

    Raises `RunsCode` when a file of `what` asks for more; `check` says so beforehand, with the name of the file.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise RunsCode(f"checkpoint {what}: refused, {first_line(error)[:120]}; nothing was run") from error
    except RuntimeError as error:
        # A tensor whose bytes do not have the archive's own checksum is noticed when it is read, not by `check`.
        if "PytorchStreamReader" not in str(error):
            raise
        raise ConfigError(
            f"checkpoint {what}", None, f"damaged ({first_line(error)[:120]}); remove it and go on"
        ) from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes() -> list[Any]:
    """Classes without behaviour of their own while they are unpickled: enumerations, scalers, records."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
