"""The steps, one a file: each takes a `Job` and fills its folder; `validate` compares two models. No step calls another."""
