"""This machine, its files, and the log lines of other libraries."""
