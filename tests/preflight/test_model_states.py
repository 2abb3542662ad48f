"""Bytes of parameters, gradients and optimizer per rank. A real engine is counted in test_memory_of_engine.py."""

import dataclasses

import pytest
import torch

from clex_train.config.engine import EngineConfig, Offload, Precision
from clex_train.config.optim import OptimConfig
from clex_train.config.root import Config
from clex_train.engine import deepspeed as engines
from clex_train.preflight import model_states

BF16 = model_states.Sharding(stage=3, world_size=8, parameter=2, gradient=2, on_gpu=True, reduce_bucket=100)
BLOCKS = (1000, *[500] * 10, 1000)
COUNT = sum(BLOCKS)


def test_state_of_zero_3_in_bf16_is_16_bytes_per_parameter_over_the_ranks():
    s = dataclasses.replace(BF16, prefetch_bucket=0, max_reuse_distance=0, reduce_bucket=1)
    held = (model_states.parameters(s, BLOCKS), model_states.gradients(s, COUNT), model_states.optimizer(s, COUNT))
    gathered, buckets = 2 * 1000, 2 * 1 + 2 * 1
    assert sum(part.device for part in held) == 16 * COUNT / 8 + gathered + buckets
    assert all(part.host == 0 for part in held)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(0, 2, 2, 12), (1, 2, 2, 12 / 8), (2, 2, 2 / 8, 12 / 8), (3, 2 / 8, 2 / 8, 12 / 8)],
)
def test_each_stage_shards_as_in_the_paper(stage, parameters, gradients, optimizer):
    s = dataclasses.replace(BF16, stage=stage, reduce_bucket=0)
    whole = 2 * model_states.live_parameters(s, BLOCKS) if stage == 3 else 0
    assert model_states.parameters(s, BLOCKS).device == parameters * COUNT + whole
    assert model_states.gradients(s, COUNT).device == gradients * COUNT
    assert model_states.optimizer(s, COUNT).device == optimizer * COUNT


def test_float32_without_zero_needs_no_master_copy():
    s = dataclasses.replace(BF16, stage=0, parameter=4, gradient=4)
    assert model_states.optimizer(s, COUNT).device == 8 * COUNT


def test_one_rank_gathers_nothing():
    s = dataclasses.replace(BF16, world_size=1)
    assert model_states.parameters(s, BLOCKS).device == 2 * COUNT


def test_layers_near_the_loss_stay_gathered_and_recomputation_releases_more():
    # Parameters used before a layer is reused: 0 after the head, 2,000 after the last layer, then 1,000 more per layer
    # (1,500 if layers are recomputed).
    s = dataclasses.replace(BF16, prefetch_bucket=0, max_reuse_distance=4001)
    assert model_states.live_parameters(s, BLOCKS) == 1000 + 3 * 500
    assert model_states.live_parameters(dataclasses.replace(s, checkpointing=True), BLOCKS) == 1000 + 2 * 500


def test_prefetching_fills_the_live_limit_and_never_more_than_the_model():
    s = dataclasses.replace(BF16, max_reuse_distance=0, max_live=3000)
    assert model_states.live_parameters(s, BLOCKS) == 3000
    assert model_states.live_parameters(dataclasses.replace(s, max_live=10**9), BLOCKS) == COUNT


def test_offload_moves_state_but_not_buckets_to_the_host():
    s = dataclasses.replace(BF16, offload_optimizer=True, offload_parameters=True)
    parameters, gradients, optimizer = (
        model_states.parameters(s, BLOCKS),
        model_states.gradients(s, COUNT),
        model_states.optimizer(s, COUNT),
    )
    assert parameters.host == 2 * COUNT / 8
    assert parameters.device == 2 * model_states.live_parameters(s, BLOCKS)
    assert gradients.host == 2 * COUNT / 8
    assert gradients.device == 2 * 2 * 100
    assert optimizer == model_states.MemoryUse(0.0, 16 * COUNT / 8)


def test_an_update_takes_one_sub_group_at_a_time():
    one_group = model_states.update_workspace(BF16, COUNT).device
    assert one_group == (4 + 2) * COUNT / 8
    assert model_states.update_workspace(dataclasses.replace(BF16, sub_group=300), COUNT).device == (4 + 2) * 300


def test_sizes_are_read_from_the_deepspeed_configuration():
    config = Config(
        engine=EngineConfig(zero_stage=3, offload=Offload.all, precision=Precision.bf16),
        optim=OptimConfig(batch_rows=32),
    )
    settings = engines.deepspeed_dict(config, 8)
    s = model_states.sharding(settings, 8, torch.bfloat16, checkpointing=True, on_gpu=True)
    assert (s.stage, s.world_size, s.accumulation, s.parameter, s.gradient) == (3, 8, 4, 2, 4)
    assert s.offload_optimizer
    assert s.offload_parameters
    settings["data_types"] = {"grad_accum_dtype": "bf16"}
    settings["zero_optimization"]["reduce_bucket_size"] = 7
    changed = model_states.sharding(settings, 8, torch.bfloat16, checkpointing=True, on_gpu=True)
    assert (changed.gradient, changed.reduce_bucket) == (2, 7)


def test_defaults_are_those_of_the_installed_deepspeed():
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    assert zero_config.reduce_bucket_size == model_states.REDUCE_BUCKET
    assert zero_config.prefetch_bucket_size == model_states.PREFETCH_BUCKET
    assert zero_config.max_live_parameters == model_states.MAX_LIVE
    assert zero_config.max_reuse_distance == model_states.MAX_REUSE_DISTANCE
    assert zero_config.sub_group_size == model_states.SUB_GROUP


def test_the_ode_is_small_and_in_host_memory():
    held = model_states.ode(num_pairs=64, num_hidden=128, num_steps=32)
    assert held.device == 0
    assert held.host == 16 * 2 * 64 * 128 + 4 * 32 * 4 * (2 * 64 + 2 * 128)
