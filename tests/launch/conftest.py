"""A folder in which a job script finds stand-ins for SLURM's commands."""

import pytest

from tests.launch.job_runs import Lab


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)
