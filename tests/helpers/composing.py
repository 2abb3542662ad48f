"""Composition of the real configuration, as in train.py."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from clex_train.config import root as configuration
from clex_train.config.root import Config
from clex_train.console.overrides import for_hydra

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    """Compose and check the configuration of `train.py OVERRIDES`."""
    configuration.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return configuration.to_config(compose("config", overrides=for_hydra(Config, overrides)))
