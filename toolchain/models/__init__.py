"""Checkpoints: where one comes from, whether it is safe to read, and how its architecture is laid out."""
