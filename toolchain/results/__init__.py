"""Benchmark results: the result file, and the statistics that a comparison computes from it."""
