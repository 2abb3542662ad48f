"""Command-line programs: train, evaluate, generate, export, report, lm-eval, info."""
