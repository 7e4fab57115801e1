"""Sizes of a model, read from its config in an artifact's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.passes import Context


def context_of(folder: Path) -> Context:
    """What an artifact's config says of its model."""
    config = _config(folder)
    return Context(config.num_attention_heads, config.hidden_size)


def layers_in(folder: Path) -> int:
    """How many layers the encoder has."""
    return int(_config(folder).num_hidden_layers)


def word_width(folder: Path) -> int:
    """The width of a row of the table of words, which ELECTRA, ALBERT and MobileBERT project to the encoder's."""
    config = _config(folder)
    return int(getattr(config, "embedding_size", config.hidden_size))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    # Architectures spell these differently in config.json; transformers knows each one's spelling.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
