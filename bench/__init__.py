"""Benchmarks: one list of cases, the training steps people write today, and the time of both."""
