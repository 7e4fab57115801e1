"""Comparing results: rows against a baseline, limits, regressions, and reports."""
