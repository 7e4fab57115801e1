"""Quantisation: activation scales from data, and the sensitivity of each layer."""
