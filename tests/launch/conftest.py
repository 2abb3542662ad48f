"""A folder in which a job script finds stand-ins for SLURM's commands."""

import pytest
from job_runs import Lab


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)
