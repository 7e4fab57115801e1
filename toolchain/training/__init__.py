"""Training: the one loop, its losses, its batches and its arithmetic."""
