"""Learning-rate schedules, and the translation of our configuration to DeepSpeed's."""

import itertools

import pytest
import torch

from clex_train.config.engine import EngineConfig, Offload, Precision
from clex_train.config.optim import OptimConfig, Schedule
from clex_train.config.root import Config
from clex_train.engine import deepspeed as engines


def test_cosine_rises_over_the_warm_up_peaks_and_ends_at_the_floor():
    optim = OptimConfig(lr=1.0, steps=100, warmup=0.1, min_lr_ratio=0.2)
    rates = [engines.learning_rate(step, optim) for step in range(101)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize(("schedule", "middle"), [(Schedule.linear, 0.5), (Schedule.constant, 1.0)])
def test_other_schedules_decay_as_named(schedule, middle):
    optim = OptimConfig(lr=1.0, steps=100, warmup=0.0, schedule=schedule)
    assert engines.learning_rate(50, optim) == pytest.approx(middle)


def test_learning_rate_agrees_with_the_cosine_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optim = OptimConfig(lr=0.5, steps=40, warmup=0.25)
    parameter = torch.nn.Parameter(torch.zeros(1))
    adamw = torch.optim.AdamW([parameter], lr=0.5)
    theirs = get_cosine_schedule_with_warmup(adamw, 10, 40)
    for step in range(40):
        if step >= 10:
            assert engines.learning_rate(step, optim) == pytest.approx(adamw.param_groups[0]["lr"])
        adamw.step()
        theirs.step()


def test_accumulation_follows_from_rows_and_ranks():
    config = Config()
    config.optim.batch_rows, config.engine.micro_batch = 48, 2
    assert engines.split_batch(config, world_size=4) == (2, 6)
    config.engine.accumulation = 6
    assert engines.deepspeed_dict(config, 4)["gradient_accumulation_steps"] == 6


def test_the_default_micro_batch_is_the_whole_share_of_a_rank():
    config = Config(engine=EngineConfig(micro_batch=None))
    config.optim.batch_rows = 8
    assert engines.split_batch(config, world_size=1) == (8, 1)
    assert engines.split_batch(config, world_size=2) == (4, 1)
    config.engine.accumulation = 2
    assert engines.split_batch(config, world_size=2) == (2, 2)


def test_an_indivisible_batch_is_refused_by_key():
    config = Config()
    config.optim.batch_rows = 10
    with pytest.raises(ValueError, match=r"optim\.batch_rows=10: must be a multiple of .* 1 \* 4"):
        engines.split_batch(config, world_size=4)


def test_contradictory_accumulation_is_refused_by_key():
    config = Config()
    config.optim.batch_rows, config.engine.accumulation = 8, 4
    with pytest.raises(ValueError, match=r"engine\.accumulation=4: .* need 8"):
        engines.split_batch(config, world_size=1)


@pytest.mark.parametrize(
    ("offload", "keys"),
    [
        (Offload.none, set()),
        (Offload.optimizer, {"offload_optimizer"}),
        (Offload.all, {"offload_optimizer", "offload_param"}),
    ],
)
def test_offload_is_passed_to_deepspeed(offload, keys):
    config = Config(engine=EngineConfig(offload=offload, precision=Precision.bf16))
    made = engines.deepspeed_dict(config, 1)
    assert {key for key in made["zero_optimization"] if key.startswith("offload")} == keys
    assert made["bf16"] == {"enabled": True}


def test_weight_decay_applies_to_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    config = Config(optim=OptimConfig(weight_decay=0.1))
    groups = engines._optimizer(model, config).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 3)]


def test_sequence_parallel_ranks_count_as_one_reader():
    config = Config(engine=EngineConfig(micro_batch=2, sequence_parallel=4))
    config.optim.batch_rows = 12
    assert engines.split_batch(config, world_size=8) == (2, 3)
    settings = engines.deepspeed_dict(config, 8)
    # DeepSpeed asserts this product, counting each of its ranks as reading separate rows.
    assert settings["train_batch_size"] == 2 * 3 * 8


@pytest.mark.parametrize("world_size", [1, 6])
def test_a_world_size_that_is_not_a_multiple_of_the_group_is_refused(world_size):
    config = Config(engine=EngineConfig(sequence_parallel=4))
    with pytest.raises(ValueError, match=rf"engine\.sequence_parallel=4: must divide .* ranks, {world_size}"):
        engines.split_batch(config, world_size)


def test_a_batch_indivisible_by_groups_is_refused_by_key():
    config = Config(engine=EngineConfig(sequence_parallel=2))
    config.optim.batch_rows = 5
    with pytest.raises(
        ValueError, match=r"optim\.batch_rows=5: must be .* groups of engine.sequence_parallel ranks = 1 \* 2"
    ):
        engines.split_batch(config, 4)
