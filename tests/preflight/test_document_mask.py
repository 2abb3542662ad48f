"""Document-mask support by model family: judged from the architecture, and confirmed by logits."""

import pytest
import torch
from transformers import AutoConfig

from clex_train.config.attention import AttentionImplementation
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale
from clex_train.preflight.document_mask import check_document_mask, require_separable
from tests.rope.rotary_families import FAMILIES, tiny_model, tokens

INSEPARABLE = {"falcon", "gpt_oss", "ministral3", "qwen3_next", "qwen3_5_text"}
SDPA, FLASH = AttentionImplementation.sdpa, AttentionImplementation.flash_attention_2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_judgement_agrees_with_the_logits(family):
    model = tiny_model(family)
    first = tokens(1, 12)
    second = first.clone()
    second[0, :5] = tokens(1, 5, seed=2)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids, position_ids=positions, use_cache=False).logits for ids in (first, second))
    assert (one[0, :5] - other[0, :5]).abs().max() > 1e-3, "the first document did change"
    leaks = bool((one[0, 5:] - other[0, 5:]).abs().max() > 1e-6)
    # Falcon isolates documents since transformers 5.24 by custom masks, which are not relied on.
    assert not leaks or family in INSEPARABLE
    if family in INSEPARABLE:
        with pytest.raises(ValueError, match=rf"data\.document_mask=True: model_type={family} .*set it to false"):
            require_separable(model.config, SDPA)
    else:
        require_separable(model.config, SDPA)


def small(family, **settings):
    return AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=2, vocab_size=40, **settings)


@pytest.mark.parametrize(
    ("arch", "implementation", "reason"),
    [
        (lambda: small("gpt_oss"), SDPA, "layer 0 and 1 others mix tokens"),
        (lambda: small("stablelm"), FLASH, "layer 0 and 1 others mix tokens"),
        (lambda: small("minimax", layer_types=["full_attention", "linear_attention"]), SDPA, "layer 1 and 0 others"),
        (lambda: small("falcon_h1"), SDPA, r"mamba\.conv1d mixes tokens"),
    ],
)
def test_leaking_architectures_are_refused_with_a_reason(arch, implementation, reason):
    """Cover masks without boundaries, lengths that flash attention does not get, and layers other than attention."""
    with pytest.raises(ValueError, match=rf"document_mask=True: model_type=.*{reason}.*set it to false"):
        require_separable(arch(), implementation)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - INSEPARABLE - {"stablelm"}))
def test_families_that_pass_document_lengths_to_flash_attention_are_accepted(family):
    require_separable(tiny_model(family).config, FLASH)


def configuration(**log_scale):
    config = Config()
    config.data.document_mask, config.data.seq_len = True, 64
    config.scaling.log_scale = log_scale["policy"]
    return config


@pytest.mark.parametrize(("policy", "context_len"), [(LogScale.always, 63), (LogScale.official, 128)])
def test_log_scaling_by_row_length_is_refused(policy, context_len):
    with pytest.raises(ValueError, match=rf"scaling\.log_scale={policy.name}: .* with data.document_mask=true use off"):
        check_document_mask(configuration(policy=policy), small("llama"), context_len)


@pytest.mark.parametrize("policy", [LogScale.off, LogScale.eval, LogScale.always])
def test_log_scaling_independent_of_rows_is_allowed(policy):
    check_document_mask(configuration(policy=policy), small("llama"), 64)


@pytest.mark.parametrize("policy", [LogScale.token, LogScale.token_eval])
def test_log_scaling_by_token_counts_within_documents_and_is_allowed_in_rows_beyond_l(policy):
    check_document_mask(configuration(policy=policy), small("llama"), 16)


def test_a_leaking_family_can_train_with_joined_documents():
    config = configuration(policy=LogScale.always)
    config.data.document_mask = False
    check_document_mask(config, tiny_model("falcon").config, 16)
