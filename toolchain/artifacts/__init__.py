"""Artifacts: variant names, the rules that derive variants, artifact folders with manifests, and their publication."""
