"""Explanations of variants and of errors: the content of `toolchain explain`."""
