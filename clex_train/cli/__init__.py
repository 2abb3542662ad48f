"""Command-line programs: train, evaluate, export, report, lm-eval, info."""
