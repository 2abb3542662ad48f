"""Fixtures of the SLURM tests: a real cluster of two nodes and its launcher; skipped without SLURM."""

import pytest

from tests.slurm.slurm_cluster import Cluster, missing_programs
from tests.slurm.slurm_jobs import Jobs


@pytest.fixture(scope="session")
def cluster():
    """Start two nodes for the whole session."""
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no {', '.join(missing)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def jobs(cluster, tmp_path_factory, tiny_store, tiny_architecture) -> Jobs:
    """Submit in one session folder, so that several tests can use an uninterrupted run."""
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"), tiny_store, tiny_architecture)
