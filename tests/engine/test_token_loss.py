"""The loss of a micro batch against that of transformers, for several model families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clex_train.engine import token_loss
from clex_train.engine.tiled_loss import IGNORED
from clex_train.evaluation.perplexity import evaluating
from clex_train.evaluation.scoring_head import score_chunk, tiled_head, token_nll
from clex_train.training.non_finite import find

VOCABULARY, ROWS, TOKENS, TILE = 61, 3, 17, 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
}


def build(family: str, **settings):
    """Build a seeded random model with weights large enough to matter."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **settings}))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels; the second row is half padding, and the last has nothing to score."""
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 9:] = labels[2] = IGNORED
    return ids, labels


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_match_those_of_transformers(family: str) -> None:
    model, (ids, labels) = build(family), rows()
    stock = model(input_ids=ids, labels=labels, use_cache=False).loss
    expected, targets = gradients(model, 0.7 * stock), token_loss.shifted(labels)
    for loss in (token_loss.loss_from_logits, token_loss.loss_in_tiles):
        if loss is token_loss.loss_in_tiles:
            token_loss.install_tiles(model, TILE)
        found = loss(model, targets, input_ids=ids)
        torch.testing.assert_close(found, stock, rtol=2e-6, atol=0)
        for name, gradient in gradients(model, 0.7 * found).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_prepared_model_is_unchanged_without_targets() -> None:
    model, (ids, labels) = build("gemma2"), rows()
    before = model(input_ids=ids, labels=labels, use_cache=False)
    token_loss.install_tiles(model, TILE)
    after = model(input_ids=ids, labels=labels, use_cache=False)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_the_router_loss_is_added_as_in_transformers() -> None:
    model, (ids, labels) = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), rows()
    stock = model(input_ids=ids, labels=labels, use_cache=False)
    assert stock.aux_loss > 0
    found = token_loss.loss_from_logits(model, token_loss.shifted(labels), input_ids=ids)
    torch.testing.assert_close(found, stock.loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("loss", [token_loss.loss_from_logits, token_loss.loss_in_tiles])
def test_rows_without_a_scored_token_do_not_count(loss) -> None:
    model, (ids, labels) = build("llama"), rows()
    token_loss.install_tiles(model, TILE)
    found = loss(model, token_loss.shifted(labels)[2:], input_ids=ids[2:])
    assert found.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, found).values())


def test_targets_may_extend_beyond_the_tokens_of_the_call() -> None:
    """Pass the next token as target, as for a rank with the first shard of a row."""
    model, (ids, _) = build("llama"), rows()
    token_loss.install_tiles(model, TILE)
    targets = token_loss.shifted(ids)
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    assert (targets[:, -1] == IGNORED).all()
    whole = token_loss.loss_in_tiles(model, targets[:, :9], input_ids=ids[:, :9])
    logits = model(input_ids=ids[:, :9], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:10].flatten())
    torch.testing.assert_close(whole, expected)


def test_the_output_layer_runs_once_and_its_weight_is_complete_once() -> None:
    model, (ids, labels) = build("qwen3"), rows()
    token_loss.install_tiles(model, TILE)
    head, calls, complete = model.get_output_embeddings(), [], []
    head.register_forward_hook(lambda *_: calls.append(1))
    head.weight.register_post_accumulate_grad_hook(lambda _: complete.append(1))
    token_loss.loss_in_tiles(model, token_loss.shifted(labels), input_ids=ids).backward()
    assert (len(calls), len(complete)) == (1, 1)
    assert head.weight is model.get_input_embeddings().weight


def test_evaluation_between_steps_tiles_separately_and_restores_the_head() -> None:
    model, (ids, labels) = build("llama"), rows()
    token_loss.install_tiles(model, TILE)
    targets = token_loss.shifted(labels)
    before = token_loss.loss_in_tiles(model, targets, input_ids=ids)
    with evaluating(model), tiled_head(model, torch.device("cpu")):
        found = score_chunk(model, ids[:, 1:], input_ids=ids, use_cache=False)
        with torch.no_grad():
            again = token_loss.loss_in_tiles(model, targets, input_ids=ids)
    with torch.no_grad():
        expected = token_nll(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, before.detach())
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_fault_is_found_in_a_tiled_loss_too() -> None:
    model, (ids, labels) = build("llama"), rows()
    token_loss.install_tiles(model, TILE)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    found = find(model, lambda: token_loss.loss_in_tiles(model, token_loss.shifted(labels), input_ids=ids))
    assert found.output == "lm_head"
    assert all(parameter.grad is None for parameter in model.parameters())
