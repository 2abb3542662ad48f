"""A folder with stand-ins for SLURM's commands, for tests of job scripts."""

import pytest

from tests.launch.job_runs import Lab


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)
