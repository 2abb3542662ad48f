"""Sampled positions on rows shorter than L: one warning, for pretrained weights alone, wherever a run is checked."""

from dataclasses import replace

import pytest

from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.preflight.positions import warn_of_short_rows, warn_of_stretched_rows

WARNED = "neighbours are 2 or more positions apart on average"


def config(positions: str, *, row_len: int = 512, path: str | None = "model", name: str = "clex", mix: float = 0.25):
    made = Config(model=ModelConfig(path=path, config=None if path else "architecture"))
    made.scaling = ScalingConfig(name=Method[name], positions=Positions[positions], mix_random=mix)
    return replace(made, data=replace(made.data, seq_len=row_len))


@pytest.mark.parametrize(
    ("positions", "rows"),
    [("random", ": rows of 512"), ("uniform", ": rows of 512"), ("mix", ": 25 % of the rows of 512")],
)
@pytest.mark.parametrize("name", ["clex", "yarn", "random_pos"])
def test_rows_that_are_stretched_are_named_with_key_value_numbers_and_remedy(positions, rows, name, caplog):
    warn_of_stretched_rows(config(positions, name=name), 1024)
    (line,) = caplog.messages
    assert line.startswith(f"scaling.positions={positions}{rows} tokens, shorter than L = 1,024, are stretched")
    assert WARNED in line
    assert "loss 4.0 became 9.4" in line
    assert "set scaling.positions=skip, " in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "harmless",
    [
        config("skip"),
        config("plain"),
        config("mix", mix=0.0),
        config("random", row_len=1024),
        config("random", row_len=4096),
        config("random", path=None),
        config("random", name="none"),
    ],
)
def test_other_runs_are_not_warned(harmless, caplog):
    warn_of_stretched_rows(harmless, 1024)
    assert caplog.messages == []


def as_used(share: float, **keys) -> Config:
    made = config("skip", **keys)
    return replace(made, scaling=replace(made.scaling, as_used=share))


def test_rows_far_below_l_are_named_with_key_numbers_and_remedies(caplog):
    warn_of_short_rows(as_used(0.2, row_len=128), 1024)
    (line,) = caplog.messages
    assert line.startswith("scaling.positions=skip: rows of 128 tokens are L / 8, ")
    assert "2 % worse at L" in line
    assert "set data.seq_len=0 " in line
    assert "scaling.as_used=0.8" in line


@pytest.mark.parametrize(
    "harmless",
    [
        as_used(0.2, row_len=256),
        as_used(1.0, row_len=128),
        as_used(0.2, row_len=128, path=None),
        as_used(0.2, row_len=128, name="yarn"),
        config("plain", row_len=128),
    ],
)
def test_other_rows_are_not_called_short(harmless, caplog):
    warn_of_short_rows(harmless, 1024)
    assert caplog.messages == []
