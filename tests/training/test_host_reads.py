"""Host reads of device tensors in a training step, counted by marking tensors on a CPU.

Results of `to_device`, tensors that transformers creates, and everything computed from these count as device tensors,
including gradients and optimizer buffers; `all_reduce_sum_to_host` copies to the host. A read is an operation on whose
result Python or a shape depends.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from clex_train.training import loop
from clex_train.training.step import ForwardPass
from clex_train.utils import distributed

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "repeat_interleave")
PACKAGES = ("clex_train", "transformers", "deepspeed")


class DeviceReads(TorchDispatchMode):
    """Count reads of tensors derived from marked ones, by package and function of the caller."""

    def __init__(self):
        super().__init__()
        # Storages are kept alive, so that no address is reused.
        self.storages, self.reads, self.brought = {}, Counter(), 0

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def has(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(map(self.has, tensors)) or (not tensors and caller().startswith("transformers")):
            if func._schema.name.removeprefix("aten::") in READS:
                self.reads[caller()] += 1
            named = zip(func._schema.arguments, args, strict=False)
            written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
            for leaf in tree_leaves((result, written)):
                if isinstance(leaf, torch.Tensor):
                    self.mark(leaf)
        return result


def caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        parts = frame.f_code.co_filename.split("/")
        for package in PACKAGES:
            if package in parts:
                return f"{package}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@pytest.fixture
def counted(tmp_path, tiny_run, monkeypatch):
    """Return a function that runs two steps of train.run and gives the counts and metrics of the second."""
    counts, figures, mode = [], [], None

    def to_device(tensor, target=None):
        moved = tensor.detach().clone()
        if mode is not None:
            mode.mark(moved)
        return moved

    def all_reduce_sum_to_host(tensor):
        brought = tensor.detach().numpy().copy()
        mode.brought += 1
        return lambda: torch.from_numpy(brought)

    step = loop.train_step

    def watched(parts, number, micro_batches):
        nonlocal mode
        held = list(micro_batches)
        with DeviceReads() as mode:
            figures.append(step(parts, number, iter(held)))
        counts.append(mode)
        return figures[-1]

    monkeypatch.setattr(distributed, "to_device", to_device)
    monkeypatch.setattr(distributed, "all_reduce_sum_to_host", all_reduce_sum_to_host)
    monkeypatch.setattr(loop, "train_step", watched)

    def run(*overrides: str):
        batch = ("optim.batch_rows=6", "engine.micro_batch=2", "optim.steps=2")
        train.run(tiny_run(tmp_path / "run", "evaluation=never", "scaling=clex", *batch, *overrides))
        return counts[-1], figures[-1]

    return run


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_has_one_host_read_of_ours_and_one_of_deepspeeds_norm(counted, stage):
    found, figures = counted(f"engine.zero_stage={stage}")
    assert found.brought == 1
    assert {place: count for place, count in found.reads.items() if place.startswith("clex_train")} == {}
    assert isinstance(figures["grad_norm"], torch.Tensor), "left on the device for the log"
    assert found.has(figures["grad_norm"]), "and known to be there"
    # transformers checks for document boundaries once in each forward, DeepSpeed reads the norm before a step, and
    # ZeRO-1 also those of the two parameter groups.
    assert found.reads == {
        "transformers: find_packed_sequence_indices": 3,
        "deepspeed: is_invalid_grad_norm": 1 if stage == 3 else 3,
    }


def test_a_read_in_the_middle_of_a_step_is_counted(counted, monkeypatch):
    whole = ForwardPass.loss

    def reading(*args):
        loss = whole(*args)
        float(loss)
        return loss

    monkeypatch.setattr(ForwardPass, "loss", reading)
    found, _ = counted()
    assert found.reads["elsewhere"] + found.reads["clex_train: forward_backward"] == 3
