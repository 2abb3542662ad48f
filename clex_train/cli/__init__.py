"""Command-line programs: evaluate, export, report, lm-eval, info; their arguments, errors and exit codes."""
