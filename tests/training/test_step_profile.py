"""The profile of a training step: attribution of known operations to its parts."""

from types import SimpleNamespace

import pytest
import step_profile
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(48)[None] % 32


@pytest.fixture(scope="module")
def microseconds():
    """Profile two steps of a small Llama with plain AdamW and a stand-in for the ODE; return microseconds by part."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    )
    engine, ode = torch.optim.AdamW(model.parameters()), SimpleNamespace(begin=lambda: torch.ones(99).cumsum(0).exp())

    def step() -> None:
        ode.begin()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        engine.step()

    step()
    calls = [(engine, "step", step_profile.OPTIMIZER), (ode, "begin", step_profile.ODE)]
    with step_profile.marked(model, calls), profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    return recorded.events()


def names_of(events, part):
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    forward = step_profile.forward_parts(host)
    return {event.name for event in host if step_profile.part_of(event, forward) == part}


@pytest.mark.parametrize(
    ("part", "forward", "backward"),
    [
        (step_profile.ATTENTION, "aten::scaled_dot_product_attention", "ScaledDotProductFlashAttentionForCpuBackward0"),
        (step_profile.MLP, "aten::silu", "SiluBackward0"),
        (step_profile.LOSS, "aten::cross_entropy_loss", "NllLossBackward0"),
        (step_profile.OPTIMIZER, "aten::sqrt", None),
        (step_profile.ODE, "aten::cumsum", None),
        (step_profile.OTHER, "aten::rsqrt", "RsqrtBackward0"),
    ],
)
def test_operations_and_their_gradients_belong_to_the_part_that_created_them(microseconds, part, forward, backward):
    names = names_of(microseconds, part)
    assert any(name.startswith(forward) for name in names), sorted(names)
    assert backward is None or any(name.endswith(backward) for name in names), sorted(names)


@pytest.mark.parametrize("name", ["SiluBackward0", "ScaledDotProductFlashAttentionForCpuBackward0", "NllLossBackward0"])
def test_a_gradient_belongs_to_a_single_part(microseconds, name):
    parts = [
        part
        for part in (step_profile.ATTENTION, step_profile.MLP, step_profile.LOSS, step_profile.OTHER)
        if any(found.endswith(name) for found in names_of(microseconds, part))
    ]
    assert len(parts) == 1


def test_the_parts_add_up_to_the_recorded_total(microseconds):
    total = sum(e.self_cpu_time_total for e in microseconds if e.device_type == torch.autograd.DeviceType.CPU)
    assert sum(step_profile.shares(microseconds, on_gpu=False).values()) == pytest.approx(total)
