"""Command lines: overrides and arguments, errors in one line, exit codes, signals."""
