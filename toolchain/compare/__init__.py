"""Comparison of results: rows against a baseline, limits, regressions and reports."""
