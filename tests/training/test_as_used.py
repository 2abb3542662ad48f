"""`scaling.as_used`: a share of steps that train what inference reads, whatever the rest of a run draws."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.data.batch import MicroBatch
from clex_train.data.position_sampling import draw_t, is_as_used
from clex_train.models.load import LoadedModel
from clex_train.scaling.clex import Clex
from clex_train.scaling.spectrum import Spectrum
from clex_train.training.ode_optimizer import FixedFrequencies, OdeOptimizer
from clex_train.training.step import choose_positions
from tests.helpers.composing import composed

BASE = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
L = 32


def test_the_share_of_steps_is_that_of_the_key() -> None:
    for share in (0.0, 0.2, 1.0):
        taken = sum(is_as_used(3, step, share) for step in range(4000)) / 4000
        assert taken == pytest.approx(share, abs=0.02)
    assert [is_as_used(3, step, 0.5) for step in range(20)] != [is_as_used(4, step, 0.5) for step in range(20)]


def test_the_other_steps_draw_what_they_would_draw_without_it() -> None:
    config = ScalingConfig(name=Method.clex, t_max=8, as_used=0.3)
    with_key = OdeOptimizer(Clex(BASE, 8.0), config, 5, t_as_used=1.0)
    for step in range(1, 40):
        spectrum = with_key.begin(step)
        assert spectrum.as_used == is_as_used(5, step, 0.3)
        assert spectrum.t == (1.0 if spectrum.as_used else draw_t(5, step, 8.0))


@pytest.mark.parametrize(("t_factor", "row", "t"), [(1, L, 1.0), (2, L, 2.0), (2, L // 4, 1.0), (2, 16 * L, 8.0)])
def test_t_is_that_of_inference_for_a_row(t_factor: float, row: int, t: float) -> None:
    config = ScalingConfig(t_max=8.0, t_factor=t_factor)
    assert config.t_as_used(row, L) == t
    table = Clex(BASE, 8.0).table([1.0, 2.0, 3.0, 8.0])
    if row <= 8 * L:
        assert replace(table, t_factor=t_factor).least_upper_bound(row, L).t == t


def test_a_formula_marks_its_steps_and_plain_rope_has_none() -> None:
    fixed = FixedFrequencies(Spectrum(BASE, t=4.0), 0.5, seed=1)
    marked = [fixed.begin(step).as_used for step in range(30)]
    assert marked == [is_as_used(1, step, 0.5) for step in range(30)]
    assert FixedFrequencies().begin(0) is None


@pytest.mark.parametrize("masked", [False, True])
def test_positions_of_a_marked_step_are_plain_and_of_others_sampled(masked: bool) -> None:
    keys = (f"data.seq_len={L}", f"data.document_mask={masked}", "scaling.positions=skip", "dry_run=true")
    config = composed("+experiment=tiny_base", "scaling=clex", *keys)
    loaded = LoadedModel(model=None, handle=None, context_len=L)  # type: ignore[arg-type]
    inside = torch.cat((torch.arange(10), torch.arange(L - 10))).expand(2, -1)
    ids = torch.ones(2, L, dtype=torch.long)
    batch = MicroBatch(ids, ids, inside if masked else None, torch.tensor([3, 4]))
    draw = choose_positions(config, loaded)
    plain = inside if masked else torch.arange(L).expand(2, -1)
    assert torch.equal(draw(batch, Spectrum(BASE, t=4.0, as_used=True)), plain.double())
    assert not torch.equal(draw(batch, Spectrum(BASE, t=4.0)), plain.double())


def test_a_run_trains_those_steps_at_the_t_of_inference(tmp_path, tiny_store, tiny_architecture) -> None:
    common = [
        "+experiment=tiny_base",
        "scaling=clex_ntk",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
    ]
    common += [f"model.context_len={L}", f"data.seq_len={L}", "evaluation=never", "optim.batch_rows=4", "optim.steps=6"]
    common += ["scaling.as_used=0.5", f"output_dir={tmp_path / 'run'}"]
    train.run(composed(*common))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seed, t_factor = composed(*common).seed, composed(*common).scaling.t_factor
    drawn = {line["step"]: line["t"] for line in lines if "t" in line}
    marked = [step for step in range(6) if is_as_used(seed, step, 0.5)]
    assert marked
    assert all(drawn[step + 1] == t_factor for step in marked)


def test_steps_as_used_alone_are_plain_training(tmp_path, tiny_store, tiny_architecture) -> None:
    common = ["+experiment=tiny_base", f"data.path={tiny_store}", f"model.config={tiny_architecture}", "optim.steps=3"]
    common += [f"model.context_len={L}", f"data.seq_len={L}", "evaluation=never", "optim.batch_rows=4"]
    for name, scaling in (("plain", ["scaling=none"]), ("clex", ["scaling=clex", "scaling.as_used=1"])):
        train.run(composed(*common, *scaling, f"output_dir={tmp_path / name}"))
    plain, clex = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("plain", "clex"))
    assert plain.keys() == clex.keys()
    assert all(torch.equal(plain[key], clex[key]) for key in plain), "the control of the studies, served at every t"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["scaling=clex", "scaling.as_used=1.5"], "scaling.as_used=1.5"),
        (["scaling=none", "scaling.as_used=0.1"], "scaling.as_used=0.1"),
        (["scaling=clex_ntk", "scaling.drift=yarn"], "scaling.drift=yarn"),
        (["scaling=pi", "scaling.field=log_time"], "scaling.field=log_time"),
        (["scaling=clex_paper", "scaling.field=log_time", "scaling.official_ntk_base=true"], "official_ntk_base"),
    ],
)
def test_keys_without_effect_are_refused(values: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        composed(*values, "dry_run=true")
