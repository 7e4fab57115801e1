"""Benchmarks of variants.

A cell is a variant on an execution provider. Each cell runs in its own processes, and all cells answer the same
sentences in interleaved rounds.
"""
