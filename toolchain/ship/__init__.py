"""Writes and checks bundles: folders with models for an app."""
