"""A `final/` that other programs will refuse is announced before training, with the remedy."""

import pytest
from transformers import AutoConfig

from clex_train.config.attention import AttentionConfig
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale, ScalingConfig
from clex_train.preflight.final_model import warn_if_unreadable
from tests.rope.rotary_families import CONTEXT, tiny_model

WINDOWS = {"sliding_window": CONTEXT // 2}


def warned(caplog, arch, log_scale: LogScale, name: Method = Method.clex) -> list[str]:
    config = Config(scaling=ScalingConfig(name=name, t_max=8, log_scale=log_scale), output_dir="runs/mine")
    caplog.clear()
    warn_if_unreadable(config, arch, CONTEXT)
    assert all("\n" not in line for line in caplog.messages)
    return caplog.messages


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_partial_rotary_with_log_scaling_is_announced_with_two_remedies(family, caplog):
    arch = tiny_model(family).config
    (line,) = warned(caplog, arch, LogScale.eval)
    assert line.startswith(
        "final/ of this run will load in clex_train alone, other programs will refuse it (log_scale="
    )
    assert "python -m clex_train.cli.export run=runs/mine format=huggingface t=" in line
    assert "set scaling.log_scale=off" in line
    assert warned(caplog, arch, LogScale.off) == []


@pytest.mark.parametrize("policy", [LogScale.token, LogScale.token_eval])
def test_log_scaling_by_token_is_announced_and_no_constant_is_offered_for_it(policy, caplog):
    (line,) = warned(caplog, tiny_model("llama").config, policy)
    assert f"(log_scale={policy.name}: every query has a factor of its own position" in line
    assert line.endswith("; set scaling.log_scale=off")
    assert "export it" not in line


def test_layers_that_share_a_rope_are_announced_without_a_remedy_that_would_not_help(caplog):
    for log_scale in (LogScale.eval, LogScale.off):
        (line,) = warned(caplog, tiny_model("gemma2", **WINDOWS).config, log_scale)
        assert "layers 0 see at most L tokens" in line
        assert line.endswith("; evaluate and serve it with clex_train")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_models_that_a_config_expresses_are_not_announced(family, caplog):
    assert warned(caplog, tiny_model(family).config, LogScale.off) == []


def test_a_config_without_head_dim_is_stated_with_it(caplog):
    # config.json of Mixtral 8x7B.
    arch = AutoConfig.from_pretrained("conf/model/architectures/mixtral_8x7b")
    assert arch.head_dim is None
    assert warned(caplog, arch, LogScale.eval) == []


def test_the_lambda_mask_is_announced(caplog):
    scaling = ScalingConfig(name=Method.clex, t_max=8)
    config = Config(scaling=scaling, attention=AttentionConfig(lambda_mask=True), output_dir="runs/mine")
    warn_if_unreadable(config, tiny_model("llama").config, CONTEXT)
    assert "other programs will refuse it (no other program has LM-Infinite's mask)" in caplog.text


def test_latent_attention_with_log_scaling_is_announced_with_the_one_remedy_that_helps(caplog):
    (line,) = warned(caplog, tiny_model("deepseek_v3").config, LogScale.eval)
    assert line.endswith("; set scaling.log_scale=off")


def test_runs_without_a_field_are_not_announced(caplog):
    arch = tiny_model("gpt_neox").config
    assert warned(caplog, arch, LogScale.off, Method.yarn) == []
