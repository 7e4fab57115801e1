"""Builds of artifacts: the workspace of one model, the pipeline, and the steps that it runs."""
