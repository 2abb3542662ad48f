"""The plan of a run with adapters: 7B on one card of 24 GB, counted like the trained set, smaller than full tuning."""

import pytest
import torch

from clex_train.config.engine import EngineConfig
from clex_train.preflight import meta_model
from clex_train.preflight.dry_run import print_plan
from clex_train.preflight.memory_plan import BESIDES
from tests.adapters.adapted import settings
from tests.engine.test_token_loss import build
from tests.helpers.composing import composed
from tests.preflight.test_dry_run import GIB, part, plan_of

pytest.importorskip("peft")

ONE_CARD = ("+experiment=llama2_7b_clex", "engine=zero2", "engine.world_size=1", "engine.micro_batch=1")
HIDDEN, INNER, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
BASE = 6_738_415_616
USABLE = 24e9 - BESIDES * GIB


@pytest.fixture(scope="module")
def plans():
    chosen = {"none": (), "lora": (), "longlora": (), "all": ("adapter=lora", "adapter.targets=[all-linear]")}
    return {name: plan_of(*ONE_CARD, *(more or (f"adapter={name}",))) for name, more in chosen.items()}


def test_trained_parameters_are_those_of_the_formula(plans):
    attention = LAYERS * 4 * 2 * HIDDEN
    whole = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    assert plans["none"].counts.trainable == plans["none"].counts.total == BASE
    assert plans["lora"].counts.trainable == 16 * attention
    assert plans["longlora"].counts.trainable == 8 * attention + whole
    assert plans["all"].counts.trainable == 16 * (attention + LAYERS * 3 * (HIDDEN + INNER))
    for plan in plans.values():
        added = plan.adapters.num_adapter if plan.adapters else 0
        assert plan.counts.total == sum(plan.counts.blocks) == BASE + added
        assert plan.subject.num_parameters == BASE


def test_gradients_and_optimizer_count_trained_parameters_alone_and_parameters_all(plans):
    for plan in (plans["lora"], plans["longlora"], plans["all"]):
        trained, total = plan.counts.trainable, plan.counts.total
        assert part(plan, "parameters").device[0] == 2 * total
        # bf16 buckets, and what is accumulated in float32.
        assert part(plan, "gradients").device[0] == 2 * 500_000_000 + 4 * trained
        assert part(plan, "optimizer").device[0] == 12 * trained


def test_a_7b_model_fits_one_card_of_24_gb_with_adapters_and_not_without(plans):
    assert plans["none"].peak > 4 * USABLE
    for name in ("lora", "longlora", "all"):
        assert plans[name].peak < USABLE, name


def test_the_plan_prints_the_adapter_and_its_share(capsys):
    print_plan(composed(*ONE_CARD, "adapter=lora", "dry_run=true"))
    printed = capsys.readouterr().out
    assert "adapter     lora, rank 16, alpha 32, on k_proj, o_proj, q_proj, v_proj\n" in printed
    assert "16,777,216 of 6,755,192,832 parameters are trained (0.25 %)" in printed


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_of_frozen_layers_are_not_kept(recomputed):
    arch = build("llama").config
    engine = EngineConfig(activation_checkpointing=recomputed)
    given = {"rows": 2, "tokens": 64, "dtype": torch.float32, "attention": "sdpa", "learns_frequencies": False}
    full, adapted = (
        meta_model.footprint(arch, engine=engine, adapter=adapter, **given) for adapter in (None, settings())
    )
    # An MLP keeps no inputs for gradients of its weights, and the last norm none at all.
    assert 0.5 < adapted.activations / full.activations < 0.95
