"""Chooses activation scales from data, and measures how sensitive each layer is to quantisation."""
