"""Start runs: SLURM jobs, the quick start, the study."""
