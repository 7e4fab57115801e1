"""The steps, one per file: each fills the folder of a `Job`; `validate` compares two models. No step calls another."""
