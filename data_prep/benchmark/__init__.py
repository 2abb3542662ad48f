"""Long-context benchmarks from their published files, as rows and task files for lm-eval; nothing is downloaded."""
