"""Building artifacts: one model's folder, the pipeline, and the steps it runs."""
