"""Quantises the weights of an ncnn model to int8, in ncnn's own file format.

ncnn's tool for this, ncnn2int8, is in no Python package. This module chooses the same scales: one for each row of the
query, key and value matrices, and one for each other matrix and each embedding table. At run time, ncnn quantises the
activations by batch. The layers of the classification head stay fp32, because ncnn needs a calibration for them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RAW, INT8 = 0, 0x000D4B38  # tags before a weight in the .bin file: fp32 or int8 values follow
INT8_TERM = 18  # number of the parameter that states that a layer is int8
SCALES = 2  # value of this parameter: the file has scales for the weights


class _Weights:
    """Copies weights from one .bin file to another, as they are or in int8."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0
        self.written = bytearray()

    def copy(self, count: int) -> None:
        """Copies `count` fp32 values without a tag."""
        self.written += self._read(4 * count)

    def copy_tagged(self, count: int) -> None:
        """Copies a tag and `count` fp32 values."""
        self._require_raw()
        self.written += struct.pack("<I", RAW) + self._read(4 * count)

    def quantize(self, count: int, rows: int) -> bytes:
        """Writes `count` values in int8 and returns their scales, one for each of `rows` groups of equal size."""
        import numpy as np

        self._require_raw()
        values = np.frombuffer(self._read(4 * count), np.float32).reshape(rows, -1)
        largest = np.abs(values).max(axis=1, keepdims=True)
        scales = np.float32(127) / np.where(largest == 0, np.float32(127), largest)
        quantized = np.rint(values * scales).astype(np.int8).tobytes()
        padding = bytes(-len(quantized) % 4)
        self.written += struct.pack("<I", INT8) + quantized + padding
        return scales.astype(np.float32).tobytes()

    def require_end(self) -> None:
        """Requires that all weights were read.

        Raises:
            ValueError: The file is longer than the layers' weights.
        """
        if self._position != len(self._content):
            raise ValueError(f"{len(self._content) - self._position} bytes of weights belong to no known layer.")

    def _require_raw(self) -> None:
        (tag,) = struct.unpack("<I", self._read(4))
        if tag != RAW:
            raise ValueError(f"A weight has the unexpected tag {tag:#x}.")

    def _read(self, size: int) -> bytes:
        part = self._content[self._position : self._position + size]
        if len(part) < size:
            raise ValueError("The file of weights is too short.")
        self._position += size
        return part


def _parameters(words: list[str]) -> dict[int, Any]:
    """Returns the integer parameters of a layer's line."""
    pairs = (word.split("=", 1) for word in words)
    return {int(key): int(value) for key, value in pairs if value.lstrip("-").isdigit()}


def _quantize_layer(kind: str, values: dict[int, Any], weights: _Weights) -> bool:
    """Copies the weights of one layer; returns whether the layer is int8 now."""
    if kind == "Embed":
        weights.written += weights.quantize(values[3], 1)
        return True
    if kind == "Gemm" and values.get(5):
        scale = weights.quantize(values[8] * values[9], 1)
        weights.copy_tagged(values[8])
        weights.written += scale
        return True
    if kind == "MultiHeadAttention":
        width, size = values[0], values[2]
        scales = b""
        for rows in (width, width, width, 1):
            scales += weights.quantize(size, rows)
            weights.copy(width)
        weights.written += scales
        return True
    if kind == "LayerNorm":
        weights.copy(2 * values[0])
    elif kind == "MemoryData":
        weights.copy(math.prod(values[key] for key in (0, 1, 2) if values.get(key)))
    elif kind == "InnerProduct":
        weights.copy_tagged(values[2])
        weights.copy(values[0])
    return False


def _quantize_lines(lines: list[str], weights: _Weights) -> Iterator[str]:
    for line in lines:
        kind, _, inputs, outputs, *words = line.split()
        parameters = words[int(inputs) + int(outputs) :]
        is_int8 = _quantize_layer(kind, _parameters(parameters), weights)
        yield f"{line} {INT8_TERM}={SCALES}" if is_int8 else line


def quantize(source: Path, target: Path) -> None:
    """Writes the int8 model of an fp32 model.

    Args:
        source: Path of the fp32 model without the endings ``.param`` and ``.bin``.
        target: Path of the int8 model without these endings.

    Raises:
        ValueError: The weights do not fit the layers.
    """
    magic, counts, *lines = Path(f"{source}.param").read_text().splitlines()
    weights = _Weights(Path(f"{source}.bin").read_bytes())
    quantized = list(_quantize_lines(lines, weights))
    weights.require_end()
    Path(f"{target}.param").write_text("\n".join([magic, counts, *quantized, ""]))
    Path(f"{target}.bin").write_bytes(weights.written)
