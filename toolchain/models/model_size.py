"""Whether a checkpoint's weights are large enough for the model that its config describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.errors import CheckpointError


def require_weights_for(config: dict[str, Any], folder: Path) -> None:
    """Raises `CheckpointError` if a config describes a model that is far larger than the weights in the folder.

    transformers builds the whole model before it reads the weights, so a config of a few bytes could fill the memory.
    """

    def largest(*names: str) -> int:
        sizes = [value for name in names if isinstance(value := config.get(name), int)]
        return min(max(sizes, default=1), 10**12)

    width = largest("hidden_size", "dim", "d_model", "n_embd", "embedding_size")
    layers = largest("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")
    inner_width = largest("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "d_ff", "d_inner")
    rows = largest("vocab_size", "max_position_embeddings", "type_vocab_size", "num_labels")
    parameters = layers * (1 + 4 * width**2 + 2 * width * inner_width) + rows * width
    stored_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    # A 4-bit weight has half a byte, and all layers may share their weights, so the limit is generous.
    if stored_bytes and parameters > 100 * stored_bytes + 10_000_000:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of {parameters:.3g} parameters, but the weights have "
            f"{stored_bytes:,} bytes.",
            "Do not use this checkpoint, or correct its config.json.",
        )
