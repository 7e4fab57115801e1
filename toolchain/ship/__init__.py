"""Bundles for apps, and their checks."""
