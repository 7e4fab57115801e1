"""Texts and labels: their files and data sets, and the token arrays that a session takes."""
