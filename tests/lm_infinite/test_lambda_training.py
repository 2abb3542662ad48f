"""Training under LM-Infinite's mask, and the mask over the frequencies of a trained table."""

import pytest
import torch

from clex_train.config import root as configuration
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.evaluation import methods
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.models import architecture, load
from clex_train.rope.patch import install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.methods.pi import pi_table
from tests.helpers.composing import composed
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens

SMALL = ("engine.zero_stage=0", "data.seq_len=64")


def loaded_for_training(config: Config) -> load.LoadedModel:
    arch = architecture.to_train(config.model)
    arch.num_hidden_layers, arch.hidden_size, arch.intermediate_size, arch.vocab_size = 2, 64, 64, 61
    return load.load_for_training(config, arch, torch.float32, {})


def test_a_run_with_the_lambda_mask_trains_under_it():
    ids = tokens(2, 64)
    masked = loaded_for_training(composed("attention=lambda", "attention.n_local=16", *SMALL)).model
    plain = loaded_for_training(composed(*SMALL)).model
    full = plain(ids, labels=ids).loss
    apply_lm_infinite(plain, 16, 10)
    expected = plain(ids, labels=ids).loss
    loss = masked(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)
    assert (loss - full).abs().item() > 1e-5
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in masked.parameters())


def test_the_window_is_the_trained_context_by_default():
    loaded = loaded_for_training(composed("attention=lambda", *SMALL))
    layers = {m.lm_infinite_layer.n_local for m in loaded.model.modules() if hasattr(m, "lm_infinite_layer")}
    assert layers == {loaded.context_len}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.document_mask=true"], "data.document_mask=True: attention=lambda"),
        (["scaling=clex"], "scaling.positions=skip: attention=lambda"),
        (["evaluation.methods=[none,lm_infinite]"], "evaluation.methods="),
        (["evaluation.protocols=[chunked]"], "evaluation.protocols="),
    ],
)
def test_options_incompatible_with_the_mask_are_refused_by_name(overrides, message):
    config = composed("attention=lambda", *overrides)
    with pytest.raises(ValueError, match="attention=lambda") as refused:
        configuration.check_lambda_mask(config)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_plain_positions_and_a_final_evaluation_are_compatible_with_the_mask():
    configuration.check_lambda_mask(composed("attention=lambda"))
    configuration.check_lambda_mask(composed("attention=lambda", "scaling=clex", "scaling.positions=plain"))
    after = ("evaluation.every=-1", "evaluation.methods=[lm_infinite]")
    configuration.check_lambda_mask(composed("attention=lambda", *after))
    configuration.check_lambda_mask(composed("data.document_mask=true"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.n_local=16"], "attention=lambda"),
        (["attention=lambda", "attention.n_local=0"], "attention.n_local"),
        (["attention=lambda", "attention.implementation=eager"], "attention.implementation"),
    ],
)
def test_keys_of_the_mask_out_of_range_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        composed(*overrides)


class TestMaskWithTrainedTable:
    """`lm_infinite_t`: the frequencies of the table at one t, and a window of t * L."""

    def loaded(self, grid: list[float]) -> load.LoadedModel:
        model = tiny_model("llama")
        handle = install_rotary(model, CONTEXT)
        own = pi_table(handle.base_inv_freq, torch.tensor(grid, dtype=torch.float64))
        clex = Clex(handle.base_inv_freq, t_max=8.0)
        return load.LoadedModel(model, handle, CONTEXT, clex=clex, table=own)

    def spec(self, t: float = 2.0) -> EvaluationConfig:
        lengths = [6 * CONTEXT]
        return EvaluationConfig(methods=[Method.lm_infinite], lm_infinite_t=t, n_global=3, lengths=lengths)

    def test_equals_the_mask_with_t_pinned_at_every_length(self):
        loaded, ids, spec = self.loaded([1.0, 2.0, 4.0, 8.0]), tokens(1, 6 * CONTEXT), self.spec()
        model, handle = loaded.model, loaded.handle
        handle.use(methods.model_tables(spec, loaded)["lm_infinite"])
        put_in = methods.insertions(spec, model, CONTEXT)["lm_infinite"]
        with torch.no_grad(), put_in() as mask, handle.fixed(6 * CONTEXT):
            assert mask.n_local == 2 * CONTEXT
            windowed = model(ids).logits
        handle.use(loaded.table)
        with torch.no_grad(), handle.pinned(1.0), methods.stream_insertions(spec, loaded)["lm_infinite"]() as mask:
            cache = mask.new_cache()
            streamed = [model(p, past_key_values=cache, use_cache=True).logits for p in ids.split(20, dim=1)]
        assert handle.table is loaded.table
        with torch.no_grad(), handle.pinned(2.0):
            apply_lm_infinite(model, 2 * CONTEXT, 3)
            expected = model(ids).logits
        torch.testing.assert_close(windowed, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat(streamed, dim=1), expected, rtol=0, atol=1e-5)

    def test_is_refused_without_a_table_or_for_an_unknown_t(self):
        loaded = self.loaded([1.0, 4.0, 8.0])
        with pytest.raises(ValueError, match="t=2: not on the table's grid"):
            methods.model_tables(self.spec(), loaded)
        with pytest.raises(ValueError, match=r"lm_infinite_t=2.*leave the key out"):
            methods.check(self.spec(), loaded.handle, has_clex=False)
        with pytest.raises(ValueError, match=r"evaluation\.lm_infinite_t"):
            EvaluationConfig(lm_infinite_t=0.5)
