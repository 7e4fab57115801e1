"""Checkpoints: their sources, the safety checks before reading them, and the module paths of their architectures."""
