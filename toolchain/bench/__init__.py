"""Benchmarks: every cell in processes of its own, asked the same sentences in the same rounds."""
