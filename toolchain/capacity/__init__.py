"""Capacity: the machines that a goal needs, computed from the raw samples of a result file."""
