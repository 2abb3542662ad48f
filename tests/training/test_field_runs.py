"""Runs with other vector fields and drifts: what `final/` holds and states, what continues it, what refuses it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from clex_train.config.model import ModelConfig
from clex_train.export.official import write_official
from clex_train.models import directory, load
from clex_train.scaling.fields import DirectionClex, LogTimeClex

FIELDS = {
    "log_time": ("scaling.field=log_time", "scaling.drift=yarn"),
    "direction": ("scaling.field=direction", "scaling.drift=ntk"),
    "no_drift": ("scaling.field=log_time", "scaling.drift=none"),
}
COMMON = ("scaling=clex", "scaling.t_max=4", "scaling.t_factor=1", "scaling.log_scale=off", "scaling.lr_scale=20")


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """Train a short run of each field, once."""
    folder = tmp_path_factory.mktemp("fields")

    def run(name: str):
        if not (folder / name).exists():
            short = ("evaluation=never", "optim.batch_rows=2", "optim.steps=2", "engine.zero_stage=0")
            train.run(tiny_run(folder / name, *short, *COMMON, *FIELDS[name]))
        return folder / name / "final"

    return run


@pytest.mark.parametrize(
    ("name", "kind", "drift"),
    [("log_time", LogTimeClex, "yarn"), ("direction", DirectionClex, "ntk"), ("no_drift", LogTimeClex, "none")],
)
def test_final_holds_the_field_and_states_it_at_t_max(finished, name, kind, drift) -> None:
    final = finished(name)
    loaded = load.load_for_evaluation(ModelConfig(path=str(final)))
    assert type(loaded.clex) is kind
    assert loaded.clex.drift_name == drift
    assert json.loads((final / "clex.json").read_text())["format"] == 3
    assert float(loaded.clex.residual([4.0])) > 1e-4, "it has learned"
    table = loaded.clex.table(loaded.table.t)
    assert torch.equal(table.at(4.0).inv_freq, loaded.table.at(4.0).inv_freq)
    assert table.at(4.0).attention_factor == loaded.table.at(4.0).attention_factor
    ids = torch.randint(3, 200, (1, 4 * loaded.context_len), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(final).eval()
    with torch.no_grad():
        assert (loaded.model(ids).logits - stock(ids).logits).abs().max() < 1e-5


def test_another_field_or_drift_is_refused_where_one_is_continued(tiny_run, finished, tmp_path) -> None:
    for key, value in (("field", "paper"), ("drift", "ntk")):
        keys = {"field": "log_time", "drift": "yarn"} | {key: value} | ({"drift": "ntk"} if key == "field" else {})
        overrides = [f"scaling.{name}={one}" for name, one in keys.items()]
        config = tiny_run(
            tmp_path / key, f"model.path={finished('log_time')}", "model.init=pretrained", *COMMON, *overrides
        )
        with pytest.raises(ValueError, match=rf"scaling\.{key}={value}: .* has (log_time|yarn); set scaling"):
            train.run(config)


def test_the_official_layout_refuses_a_field_that_it_does_not_have(finished, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"scaling\.field=log_time: the official layout has the paper's field alone"):
        write_official(tmp_path / "official", load.load_for_evaluation(ModelConfig(path=str(finished("no_drift")))))


def test_a_field_of_an_unknown_kind_is_damage_of_the_record(finished, tmp_path) -> None:
    record = directory.read_record(finished("direction"))
    assert record.field == "direction"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("clex.json", "clex.safetensors", "frequencies.safetensors"):
        (copy / name).write_bytes((finished("direction") / name).read_bytes())
    (copy / "clex.json").write_text((copy / "clex.json").read_text().replace('"direction"', '"other"'))
    with pytest.raises(ValueError, match=r"not the field that clex\.json describes"):
        directory.read_clex(copy)
