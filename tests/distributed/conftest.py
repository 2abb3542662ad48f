"""Fixtures of the tests of whole distributed runs."""

import pytest

from tests.distributed.distributed_runs import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, tiny_store, tiny_architecture) -> Launcher:
    """Launch in one session folder, so that several tests can use a finished run."""
    return Launcher(tmp_path_factory.mktemp("runs"), tiny_store, tiny_architecture)
