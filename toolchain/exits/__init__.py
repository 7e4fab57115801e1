"""Exits of a graph: learns their heads, and chooses their layers and the confidence from which a text exits."""
