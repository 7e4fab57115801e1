"""Sizes of a model, read from the config in an artifact's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.passes import Context


def context_of(folder: Path) -> Context:
    """Returns the `Context` with the heads and the width of the artifact's model."""
    config = _config(folder)
    return Context(config.num_attention_heads, config.hidden_size)


def layers_in(folder: Path) -> int:
    """Returns the number of layers in the encoder."""
    return int(_config(folder).num_hidden_layers)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    # In config.json, architectures use different names for the same size; transformers knows all these names.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
