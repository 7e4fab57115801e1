"""Texts and labels: the files and data sets they come from, and the token arrays a session takes."""
