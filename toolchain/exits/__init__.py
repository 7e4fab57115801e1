"""Exits of a graph: trains their heads, and chooses their layers and their confidence threshold."""
