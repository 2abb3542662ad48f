"""Benchmarks by lm-eval on a loaded model: tasks and their data, requests in groups, scores by task and method."""
