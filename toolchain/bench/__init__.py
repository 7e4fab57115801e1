"""Benchmarks: each cell runs in its own processes, and all cells answer the same sentences in interleaved rounds."""
