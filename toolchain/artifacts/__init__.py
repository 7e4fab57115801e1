"""Artifacts: the names and table of variants, the sealed folders, and how one is published."""
