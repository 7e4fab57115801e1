"""Lengths for which a session records CUDA graphs, and the padding of a text to the next of these lengths.

A CUDA graph holds the kernels of one shape of batch, and one call starts all of them. Without a CUDA graph, a small
model at batch 1 mostly waits for the starts of its kernels. A graph has fixed shapes and fixed addresses in the memory
of the GPU. So a session records graphs of a few lengths, each for a batch of one text. Larger batches run without a
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts import store
from toolchain.artifacts.manifest import Manifest
from toolchain.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

# Lengths with a graph, in tokens. The tensor cores of a GPU compute multiples of 8 rows, so smaller steps would save no
# time. Above 64 tokens, the steps are larger, because each graph needs memory and time; padding then adds at most half
# of the text's tokens. A text of more than 512 tokens keeps the GPU busy without a graph.
LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512)


def graph_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the ascending lengths with a graph, for a model of at most `max_length` tokens."""
    longest = min(max_length, LENGTHS[-1])
    return (*(length for length in LENGTHS if length < longest), longest)


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of the artifact in `folder`, which has the model's inputs and its largest length.

    Raises:
        ArtifactError: The folder has no manifest, or the manifest cannot be read.
    """
    artifact = store.load(folder)
    if artifact is None:
        raise ArtifactError(f"There is no artifact {folder}.", "Build the variant.")
    return artifact.manifest


def find_length(batch: Mapping[str, np.ndarray], lengths: Sequence[int]) -> int | None:
    """Returns the smallest of the ascending `lengths` that the batch fits in.

    Returns:
        The length; None for a batch of several texts, or with a text above the last length. Such a batch has no graph.
    """
    rows, tokens = batch["input_ids"].shape
    return next((length for length in lengths if length >= tokens), None) if rows == 1 else None


def pad_text(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns a batch of one text, padded with zeros on the right to `length` tokens.

    The attention mask of the padding is 0, so the model ignores the padding, whatever its token ids are.
    """
    import numpy as np

    arrays = {}
    for name, array in batch.items():
        arrays[name] = np.zeros((1, length), array.dtype)
        arrays[name][:, : array.shape[1]] = array
    return arrays


def remove_padding(logits: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the logits of a padded text without those of its padding, which only a token classifier gives."""
    return logits[:, :tokens] if logits.ndim == 3 else logits


def example_text(names: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Returns a batch of one text with `length` tokens for a model with the inputs `names`."""
    import numpy as np

    return {name: np.full((1, length), int(name == "attention_mask"), np.int64) for name in names}
