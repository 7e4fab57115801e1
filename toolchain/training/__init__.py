"""Training: the training loop, its losses, its batches and its numeric precision."""
