"""A tiny model and launches of it, shared by the tests of whole runs."""

import pytest

from tests.distributed.distributed_runs import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, tiny_store, tiny_architecture) -> Launcher:
    """Launches in one session folder, so that a finished run serves several tests."""
    return Launcher(tmp_path_factory.mktemp("runs"), tiny_store, tiny_architecture)
