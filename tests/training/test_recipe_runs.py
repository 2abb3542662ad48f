"""Runs of the recipes by formula: frequencies and positions in training, `final/`, and refusals."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train
from clex_train.config.model import ModelConfig
from clex_train.models import architecture as architectures
from clex_train.models import load
from clex_train.preflight.dry_run import print_plan
from clex_train.rope import recipes
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table
from clex_train.training.step import ForwardPass
from tests.helpers.composing import composed

L = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder, tiny_store, tiny_architecture):
    """Return a function that runs train.run for a few small steps and gives the run folder."""

    def start(name: str, *overrides: str):
        config = composed(*common(folder / name, tiny_store, tiny_architecture), *overrides)
        train.run(config)
        return folder / name

    return start


def common(output, store, architecture) -> list[str]:
    return [
        "+experiment=tiny_base",
        f"output_dir={output}",
        f"data.path={store}",
        f"model.config={architecture}",
        f"model.context_len={L}",
        f"data.seq_len={L}",
        "evaluation=never",
        "optim.batch_rows=4",
        "optim.steps=2",
    ]


@pytest.fixture(scope="module")
def base(run):
    """Train a base of plain RoPE for two steps and sharpen its attention, which at first ignores positions."""
    final = run("base") / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.mul_(10)
    model.save_pretrained(final)
    return final


def fine_tuned(run, base, name: str, *overrides: str):
    return run(name, "model.init=pretrained", f"model.path={base}", "seed=1", *overrides) / "final"


@pytest.fixture(scope="module")
def factors(folder):
    """Write LongRoPE factors for the 8 pairs of the tiny architecture."""
    path = folder / "factors.json"
    path.write_text(json.dumps({"short_factor": [1.0] * 7 + [1.1], "long_factor": [1.0 + j / 2 for j in range(8)]}))
    return path


@pytest.fixture(scope="module")
def finals(run, base, factors):
    """Train every recipe from one base, at rows of 4 L, or of L with positions up to 4 L; return each `final/`."""
    long = ("data.seq_len=128",)
    return {
        "pi": fine_tuned(run, base, "pi", "scaling=pi", *long),
        "ntk": fine_tuned(run, base, "ntk", "scaling=ntk", *long),
        "yarn": fine_tuned(run, base, "yarn", "scaling=yarn", "scaling.factor=4", "scaling.positions=skip"),
        "theta": fine_tuned(run, base, "theta", "scaling=theta", *long, "data.document_mask=true"),
        "dynamic_ntk": fine_tuned(run, base, "dynamic_ntk", "scaling=dynamic_ntk", *long),
        "longrope": fine_tuned(run, base, "longrope", "scaling=longrope", *long, f"scaling.longrope_factors={factors}"),
        "random_pos": fine_tuned(run, base, "random_pos", "scaling=random_pos", "scaling.t_max=4"),
        "static": fine_tuned(run, base, "static", "scaling=static", "scaling.factor=4", *EVALUATED),
    }


EVALUATED = (
    "evaluation.every=1",
    "evaluation.lengths=[32,64,128]",
    "evaluation.num_windows=2",
    "evaluation.methods=[trained]",
)


NAMES = ("pi", "ntk", "dynamic_ntk", "yarn", "theta", "longrope", "random_pos", "static")


@pytest.mark.parametrize("name", NAMES)
def test_final_is_a_stock_model_with_our_logits(finals, name):
    ids = torch.randint(3, 200, (2, 4 * L), generator=torch.Generator().manual_seed(0))
    ours = load.load_for_evaluation(ModelConfig(path=str(finals[name])))
    stock = AutoModelForCausalLM.from_pretrained(finals[name]).eval()
    with torch.no_grad():
        for length in (L // 2, 2 * L, 4 * L):
            difference = (ours.model(ids[:, :length]).logits - stock(ids[:, :length]).logits).abs().max()
            # transformers rounds the learned frequencies of `static` to float32, ours are exact.
            assert difference < (4e-6 if name == "static" else 1e-6)
    assert ours.context_len == L
    # The dynamic scaling of transformers starts at this length.
    assert stock.config.max_position_embeddings == (L if name == "dynamic_ntk" else 4 * L)
    files = {file.name for file in finals[name].iterdir()}
    assert "clex.json" not in files


def test_final_has_the_frequencies_of_the_method_at_the_factor(finals, base):
    own = load.load_for_evaluation(ModelConfig(path=str(base))).base_inv_freq
    for name, table in (("pi", pi_table), ("ntk", ntk_table)):
        found = load.load_for_evaluation(ModelConfig(path=str(finals[name]))).base_inv_freq
        expected = table(own, [1.0, 4.0]).at(4.0).inv_freq
        assert ((found - expected).abs() / expected).max() < 1e-6
    assert torch.equal(load.load_for_evaluation(ModelConfig(path=str(finals["random_pos"]))).base_inv_freq, own)


def test_static_learns_its_frequencies_and_states_them(finals, base):
    """The run's evaluations read the frequencies of their step, and `final/` states those of the last one."""
    state = torch.load(finals["static"].parent / "checkpoints" / "step_2" / "ode.pt", weights_only=True)
    start, alpha = state["clex"]["start"], state["clex"]["alpha"].double()
    assert float(alpha.abs().max()) > 1e-3, "the scalars learn at seven times the model's rate"
    found = load.load_for_evaluation(ModelConfig(path=str(finals["static"])))
    spectrum = found.handle.own.at(4.0)
    torch.testing.assert_close(spectrum.inv_freq, start * alpha.exp(), rtol=1e-6, atol=0)
    own = load.load_for_evaluation(ModelConfig(path=str(base))).base_inv_freq
    assert torch.equal(start[0], own[0]), "YaRN keeps the fastest pair"
    assert start[-1] == pytest.approx(float(own[-1]) / 4, rel=1e-6)
    ids = torch.randint(3, 200, (1, 4 * L), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # A model of two thousand weights tells frequencies apart by their logits alone.
        assert (found.model(ids).logits - at_the_start(finals["static"])(ids).logits).abs().max() > 1e-5
    for step in (1, 2):
        scores = json.loads((finals["static"].parent / "evaluation" / f"step_{step}.json").read_text())["scores"]
        assert {score["frequencies"] for score in scores} == {"static"}


def at_the_start(final):
    """Load the weights of a static `final/` with the frequencies that its run began with."""
    config = AutoConfig.from_pretrained(final)
    scores = torch.load(final.parent / "checkpoints" / "step_2" / "ode.pt", weights_only=True)["clex"]["alpha"]
    return AutoModelForCausalLM.from_pretrained(final, config=recipes.with_learned(config, -scores)).eval()


def test_pretrained_weights_are_those_of_the_base(base):
    loaded = for_training(base, "scaling=pi", f"data.seq_len={4 * L}")
    stock = AutoModelForCausalLM.from_pretrained(base)
    for name, weight in stock.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert loaded.formula is not None
    assert loaded.formula.t == 4.0


def test_rows_have_the_positions_that_the_recipe_draws(run, base, monkeypatch):
    seen = []
    training = RotaryHandle.training

    def recording(self, spectrum, positions, num_tokens):
        seen.append((spectrum.t, positions))
        return training(self, spectrum, positions, num_tokens)

    monkeypatch.setattr(RotaryHandle, "training", recording)
    fine_tuned(run, base, "sampled", "scaling=random_pos", "scaling.t_max=4.5", "optim.steps=3")
    positions = torch.cat([each for _, each in seen])
    assert {t for t, _ in seen} == {4.5}
    assert len(positions) == 12
    assert torch.equal(positions, positions.round())
    assert (positions[:, 0] == 0).all()
    assert (positions[:, -1] == 4.5 * L - 1).all()
    assert (positions.diff() > 0).all()
    seen.clear()
    fine_tuned(run, base, "plain", "scaling=pi", "data.seq_len=128")
    for _, plain in seen:
        assert torch.equal(plain, torch.arange(4 * L, dtype=torch.float64).expand(len(plain), -1))


@pytest.mark.parametrize("name", ["pi", "dynamic_ntk", "longrope"])
def test_the_first_loss_equals_that_of_the_stock_model_on_the_same_rows(run, base, factors, monkeypatch, name):
    rows = []
    loss_of = ForwardPass.loss

    def recording(self, model, batch, weight):
        rows.append(batch.token_ids)
        return loss_of(self, model, batch, weight)

    monkeypatch.setattr(ForwardPass, "loss", recording)
    given = (f"scaling.longrope_factors={factors}",) if name == "longrope" else ()
    final = fine_tuned(run, base, f"first_{name}", f"scaling={name}", "data.seq_len=128", "optim.steps=1", *given)
    stock = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(final))
    ids = torch.cat(rows)
    assert ids.shape == (4, 4 * L)
    with torch.no_grad():
        expected, plain = (
            float(model(ids, labels=ids).loss) for model in (stock, AutoModelForCausalLM.from_pretrained(base))
        )
    (loss,) = figures(final.parent, "loss")
    assert loss == pytest.approx(expected, rel=1e-6)
    assert abs(loss - plain) > 1e-4 * loss


def test_skipped_positions_train_at_the_frequencies_of_the_full_range(base):
    skipping = ("scaling=dynamic_ntk", "scaling.factor=4", "scaling.positions=skip", "data.seq_len=32")
    plain = ("scaling=dynamic_ntk", "scaling.factor=4", "data.seq_len=32")
    (reach, t), (row, _) = (
        (loaded.formula.inv_freq, loaded.formula.t)
        for loaded in (for_training(base, *skipping), for_training(base, *plain))
    )
    own = load.load_for_evaluation(ModelConfig(path=str(base))).base_inv_freq
    # transformers multiplies the base by (f n/L - f + 1)^(d/(d-2)), with f = 4, n = 4 L, d = 16.
    growth = 13.0 ** -(torch.arange(8, dtype=torch.float64) / 7)
    assert t == 4
    assert ((reach - own * growth).abs() / reach).max() < 1e-6
    assert torch.equal(row, own)


def for_training(base, *overrides: str):
    config = composed(
        "+experiment=tiny_base",
        f"model.path={base}",
        "model.init=pretrained",
        f"model.context_len={L}",
        "engine.zero_stage=0",
        *overrides,
    )
    return load.load_for_training(config, architectures.to_train(config.model), torch.float32, {})


def test_plain_positions_train_like_the_stock_model(run, base):
    """Compare plain positions with training the scaled architecture directly; yarn has an attention factor too."""
    scaling = composed("scaling=yarn", "dry_run=true").scaling
    by_hand = recipes.scaled(architectures.to_train(ModelConfig(path=str(base))), scaling, 4.0, L)
    folder = base.parent / "scaled_by_hand"
    model = AutoModelForCausalLM.from_pretrained(base, config=by_hand)
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    stock = fine_tuned(run, folder, "by_hand", "data.seq_len=128").parent
    ours = fine_tuned(run, base, "plain_yarn", "scaling=yarn", "data.seq_len=128").parent
    assert len(figures(ours, "loss")) == 2
    assert figures(stock, "loss") == figures(ours, "loss")


def test_rows_that_never_exceed_l_give_a_warning(run, base, caplog):
    fine_tuned(run, base, "short_rows", "scaling=pi", "scaling.factor=4", "optim.steps=1")
    assert "scaling.positions=plain: rows of 32 tokens show the model no position beyond L = 32" in caplog.text
    caplog.clear()
    fine_tuned(run, base, "skip_rows", "scaling=pi", "scaling.factor=4", "scaling.positions=skip", "optim.steps=1")
    assert "no position beyond" not in caplog.text


def figures(run_folder, key: str) -> list[float]:
    return [
        json.loads(line)[key] for line in (run_folder / "metrics.jsonl").read_text().splitlines() if f'"{key}"' in line
    ]


def test_a_recipe_is_trained_further_unchanged_without_scaling(run, finals):
    again = run("again", "model.init=pretrained", f"model.path={finals['yarn']}", "seed=2")
    first, second = (json.loads((path / "config.json").read_text()) for path in (finals["yarn"], again / "final"))
    assert first == second


def test_another_factor_or_other_positions_are_refused_on_resume(run, base, finals):
    same = ("scaling=yarn", "optim.steps=4")
    with pytest.raises(ValueError, match=r"yarn/checkpoints/step_2: it holds a model of another architecture"):
        fine_tuned(run, base, "yarn", *same, "scaling.factor=8", "scaling.positions=skip")
    with pytest.raises(ValueError, match=r"^optim\.steps, scaling\.positions: differs from .*yarn/config\.yaml"):
        fine_tuned(run, base, "yarn", *same, "scaling.factor=4", "scaling.positions=random")


@pytest.mark.parametrize("name", ["pi", "clex"])
def test_an_already_scaled_model_is_refused(run, finals, name):
    with pytest.raises(ValueError, match=rf"^scaling\.name={name}: .*from 32 to 128 tokens.*scaling=none"):
        fine_tuned(run, finals["ntk"], "twice", f"scaling={name}", "data.seq_len=128")


def test_a_clex_field_is_not_silently_dropped(run, base):
    clex = run("clex", "model.init=pretrained", f"model.path={base}", "scaling=clex", "scaling.t_max=4") / "final"
    with pytest.raises(ValueError, match=r"^scaling\.name=pi: .*has a CLEX field, which scaling=pi would drop"):
        fine_tuned(run, clex, "dropped", "scaling=pi")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("scaling=pi", "scaling.factor=0.5"), r"^scaling\.factor=0\.5: a scale factor is at least 1"),
        (
            ("scaling=pi", "scaling.factor=2", "data.seq_len=128"),
            r"^scaling\.factor=2\.0: 2 \* 32 tokens .*seq_len=128",
        ),
        (("scaling=random_pos", "scaling.t_max=2", "data.seq_len=128"), r"^scaling\.t_max=2\.0: 2 \* 32 tokens"),
        (("scaling=random_pos", "scaling.positions=plain"), r"^scaling\.positions=plain: random_pos with plain"),
        (("scaling=clex", "scaling.factor=4"), r"^scaling\.factor=4\.0: scaling=clex has none"),
        (("scaling=clex", "scaling.positions=plain", "data.seq_len=128"), r"^scaling\.positions=plain: rows of 128"),
        (("scaling=yarn", "scaling.log_scale=eval"), r"^scaling\.log_scale=eval: the stock config\.json"),
        (("scaling=longrope",), r"^scaling\.longrope_factors: longrope needs them"),
        (("scaling=longrope", "scaling.longrope_factors=/none.json"), r"^scaling\.longrope_factors=/none\.json: "),
        (("scaling=theta", "scaling.rope_theta=1"), r"^scaling\.rope_theta=1\.0: greater than 1"),
    ],
)
def test_unsupported_uses_of_a_recipe_are_refused_in_one_line(run, base, overrides, line):
    with pytest.raises(ValueError, match=line):
        fine_tuned(run, base, "refused", *overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("scaling=pi", "data.seq_len=512"), "pi: factor 4, L = 128: contexts up to 512 tokens; positions plain"),
        (
            ("scaling=theta", "scaling.factor=8", "scaling.positions=skip"),
            "theta: factor 8, rope_theta 1e+06, L = 128: contexts up to 1,024 tokens; positions skip",
        ),
        (
            ("scaling=dynamic_ntk", "data.seq_len=256"),
            "dynamic_ntk: factor 2, L = 128: contexts up to 256 tokens; positions plain",
        ),
        (
            ("scaling=static", "scaling.options={start:ntk}", "scaling.as_used=0.5"),
            "static: factor 16, start ntk, L = 128: contexts up to 2,048 tokens; positions skip, "
            "50 % of the steps as used",
        ),
        (
            ("scaling=clex",),
            "clex: t from 1 to 32, field log_time, drift yarn, L = 128: contexts up to 4,096 tokens; positions skip, "
            "20 % of the steps as used",
        ),
        (("scaling=clex_ntk",), "clex: t from 1 to 32, L = 128: contexts up to 4,096 tokens; positions skip"),
        (("scaling=random_pos",), "random_pos: factor 16, L = 128: contexts up to 2,048 tokens; positions random"),
    ],
)
def test_the_plan_shows_the_recipe(overrides, line, capsys):
    print_plan(composed("+experiment=tiny_base", *overrides, "dry_run=true"))
    assert f"  scaling     {line}" in capsys.readouterr().out.splitlines()


def test_factors_of_another_width_are_refused(run, base, tmp_path):
    path = tmp_path / "factors.json"
    path.write_text(json.dumps({"short_factor": [1.0] * 8, "long_factor": [2.0] * 7}))
    with pytest.raises(ValueError, match=r"^scaling\.longrope_factors=.*long_factor is a list of 8 numbers.*7 entries"):
        fine_tuned(run, base, "refused", "scaling=longrope", f"scaling.longrope_factors={path}")


def test_a_dynamic_scaling_is_trained_further_without_scaling_and_keeps_following_the_length(run, finals):
    before = AutoModelForCausalLM.from_pretrained(finals["dynamic_ntk"]).config.rope_parameters
    final = fine_tuned(run, finals["dynamic_ntk"], "on_dynamic")
    assert AutoModelForCausalLM.from_pretrained(final).config.rope_parameters == before
    with pytest.raises(ValueError, match=r"^scaling\.name=pi: model_type=llama has rope_type=dynamic"):
        fine_tuned(run, finals["dynamic_ntk"], "pi_on_dynamic", "scaling=pi", "data.seq_len=128")
