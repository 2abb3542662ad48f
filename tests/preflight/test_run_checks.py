"""The list of checks shared by a run, its dry run and its submission to SLURM: equal refusals, nothing built twice."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from clex_train.config import root as configuration
from clex_train.config.root import Config
from clex_train.console.errors import explain
from clex_train.console.overrides import for_hydra
from clex_train.engine import deepspeed as engines
from clex_train.preflight import dry_run, meta_model
from clex_train.preflight.activations import Footprint
from clex_train.preflight.run_checks import Scope, run_checks
from clex_train.utils.errors import InputError
from launch import slurm
from tests.helpers.composing import CONF


class _Passed(Exception):
    """Raised when a run passes the checks."""


CHOICES = {
    "scaling.name": ["none", "clex", "clex", "pi", "ntk", "yarn", "dynamic_ntk", "theta", "longrope", "random_pos"],
    "scaling.log_scale": ["off", "off", "eval", "always"],
    "scaling.positions": ["plain", "random", "skip"],
    "scaling.factor": [None, 4.0, 1.5],
    "scaling.t_max": [1.0, 4.0, 16.0],
    "model.context_len": [32, 16, None],
    "model.init": ["pretrained", "random"],
    "data.seq_len": [0, 32, 64, 512, 10**8],
    "data.packing": ["concat", "best_fit", "long_documents"],
    "data.min_document_tokens": [None, 10**7],
    "data.document_mask": [False, True],
    "data.skip_rows": [[], ["0-3"], ["0-9999999"]],
    "optim.batch_rows": [8, 8, 3],
    "engine.micro_batch": [None, 1, 2, 5],
    "engine.accumulation": [None, 2, 8],
    "engine.sequence_parallel": [1, 1, 2],
    "engine.tiled_mlp": [None, 8],
    "engine.tiled_loss": [None, 8],
    "engine.zero_stage": [0, 1, 3],
    "attention.implementation": ["auto", "sdpa", "eager"],
    "attention.lambda_mask": [False, False, True],
    "evaluation.every": [-1, 0, 5],
    "evaluation.lengths": [[32, 64], [], [2048], [10**6]],
    "evaluation.protocols": [["one_shot"], ["one_shot", "chunked"], ["streaming"]],
    "evaluation.methods": [["trained"], ["clex"], ["yarn", "ntk"], ["longrope"], ["lm_infinite"]],
    "evaluation.lm_infinite_t": [1.0, 2.0, 2.5],
    "evaluation.tasks": [[], ["passkey"]],
    "evaluation.task_lengths": [None, [16], [512]],
    "evaluation.allow_overlap": [False, True],
    "resume": ["auto", "strict"],
}
"""Values of keys that are valid or invalid alone or in combination."""
WRONG: tuple[dict[str, object], ...] = (
    {"data.seq_len": 10**8},
    {"optim.batch_rows": 3, "engine.micro_batch": 2},
    {"evaluation.protocols": ["streaming"]},
    {"evaluation.methods": ["longrope"]},
    {"evaluation.lengths": [10**6]},
)
"""Certain refusals, since random choices may all be valid."""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_store) -> Path:
    """Save pretrained weights with the vocabulary of the store, L = 32."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_store.parent / "tokenizer")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed_once(tmp_path_factory, tiny_store, tiny_architecture) -> DictConfig:
    """Compose a run with random weights once; choices are added without composing `conf/` again."""
    configuration.register()
    words = (
        "+experiment=tiny_base",
        f"output_dir={tmp_path_factory.mktemp('runs') / 'run'}",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "launch=cpu",
        "launch.nodes=1",
        "launch.ranks_per_node=1",
        "evaluation.lengths=[32,64]",
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=for_hydra(Config, words))


def with_choices(composed: DictConfig, choices: dict[str, object], **more: object) -> DictConfig:
    changed = composed.copy()
    for key, value in {**choices, **more}.items():
        OmegaConf.update(changed, key, value)
    return changed


def refusal_line(check, composed: DictConfig) -> str | None:
    """Return the line that refuses a configuration, or None."""
    try:
        check(configuration.to_config(composed))
    except _Passed:
        return None
    except InputError as error:
        return explain(error)
    return None


def raise_passed(*_: object) -> None:
    raise _Passed


@pytest.mark.parametrize("scope", list(Scope))
def test_run_dry_run_and_submission_warn_of_rows_stretched_beyond_their_spacing(scope, composed_once, base, caplog):
    stretched = {"data.seq_len": 16, "scaling.name": "clex", "scaling.positions": "random"}
    choices = {"model.path": str(base), "model.config": None, "evaluation.every": -1, **stretched}
    run_checks(configuration.to_config(with_choices(composed_once, choices)), scope)
    assert len([line for line in caplog.messages if line.startswith("scaling.positions=random: rows of 16")]) == 1


def test_run_dry_run_and_submission_refuse_alike_in_the_same_line(composed_once, base):
    seen = []

    @given(
        changes=st.lists(
            st.sampled_from([(key, value) for key, values in CHOICES.items() for value in values]), max_size=5
        ),
        is_pretrained=st.booleans(),
    )
    # No shrinking: a configuration of six keys is small, and each attempt takes a second.
    @settings(max_examples=24, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def compare(changes, is_pretrained):
        choices = {"model.path": str(base), "model.config": None} if is_pretrained else {}
        choices.update(changes)
        seen.append(shared_refusal(choices))

    def shared_refusal(choices):
        run = refusal_line(train.run, with_choices(composed_once, choices))
        dry = refusal_line(dry_run.print_plan, with_choices(composed_once, choices, dry_run=True))
        job = refusal_line(lambda config: slurm.check(config, Scope.submission), with_choices(composed_once, choices))
        assert run == dry == job
        return run

    with pytest.MonkeyPatch.context() as patched:
        # The first call of a run after the checks.
        patched.setattr(engines, "open_process_group", raise_passed)
        # It only measures, which takes seconds.
        patched.setattr(meta_model, "footprint", lambda *_, **__: Footprint(0, 0, 0))
        compare()
        refused = [shared_refusal(choices) for choices in WRONG]
    assert None in seen
    assert all(refused), refused


def test_a_dry_run_refuses_a_protocol_that_the_run_refuses(composed_once):
    line = refusal_line(
        dry_run.print_plan, with_choices(composed_once, {"evaluation.protocols": ["streaming"]}, dry_run=True)
    )
    assert line is not None
    assert line.startswith("evaluation.protocols=['streaming']: streaming reads one long text, after the run")


@pytest.mark.parametrize("scope", [Scope.run, Scope.plan])
@pytest.mark.parametrize(
    ("scaling", "num_models"), [("none", 1), ("clex", 2), ("pi", 2), ("yarn", 2), ("dynamic_ntk", 2), ("theta", 2)]
)
def test_the_model_of_each_architecture_is_built_once(composed_once, monkeypatch, scaling, num_models, scope):
    """Count the base and its scaled variant, for clex that of final/."""
    built, build = [], AutoModelForCausalLM.from_config

    def counted(*args, **kwargs):
        built.append(args)
        return build(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", counted)
    choices = {"scaling.name": scaling, "scaling.log_scale": "off", "engine.tiled_loss": 8, "engine.tiled_mlp": 8}
    ready = run_checks(configuration.to_config(with_choices(composed_once, choices)), scope)
    assert len(built) == num_models
    # No patched part remains in the model.
    assert type(ready.on_meta.model.rotary_emb).__module__.startswith("transformers.")
    assert type(ready.on_meta.model).__module__.startswith("transformers.")
    assert ready.on_meta.get_output_embeddings().weight.shape == (ready.arch.vocab_size, ready.arch.hidden_size)
    assert all(parameter.device == torch.device("meta") for parameter in ready.on_meta.parameters())
