"""What goes into the linear layers, seen on training sentences, and how it is quantised once and for all.

The range is the whole one seen: percentiles and the range of least squared error, tried on the reference, moved answers
of held-out rows no less. Channels are smoothed where the layer's product would be wrong by much, with the migration
strength that makes it least wrong; elsewhere it would cost a `Mul` for little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession
from toolchain.data import inputs
from toolchain.data.inputs import Encoder, TrainingSource, pad
from toolchain.passes import read, write
from toolchain.passes.int8 import quantize_weight
from toolchain.passes.quantize_linear import sharing, weights_of
from toolchain.passes.quantize_static import Activation
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SENTENCES = 300
TOKENS = 4  # of each sentence, spread evenly, on whose products errors are computed
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # α of SmoothQuant: how much of the difficulty goes over to the weights
# The noise of a product (see `_noise`) that is worth a `Mul` to lessen. On the reference this takes the ten values that
# move answers most, alone; smoothing all 25 moves answers hardly less and costs twice as much.
NOISE = 4e-3


@dataclass
class Seen:
    """Of one value: the least and the largest of every channel [width], and some tokens of it [tokens, width]."""

    low: np.ndarray
    high: np.ndarray
    tokens: np.ndarray


def calibrate(artifact: Artifact, train: TrainingSource, smooth: bool = True) -> dict[str, Activation]:
    """How what each linear layer of an fp32 graph reads is quantised, by the value's name; smoothed where it pays, if
    the pass `smooth` will be there to do it.

    Seen are `SENTENCES` rows of sentence length of the training data, none of them held out. Raises `DataError` for
    training data that does not fit the model.
    """
    graph = read(artifact.onnx_path)
    # Each of several values that share a weight would need another copy of it to be smoothed.
    weights, shared = weights_of(graph), sharing(graph)
    observed = _observe(artifact, list(weights), train)
    return {name: activation(seen, weights[name], smooth and name not in shared) for name, seen in observed.items()}


def activation(seen: Seen, weight: np.ndarray, smooth: bool = True) -> Activation:
    """The quantisation of a value that is multiplied by `weight` [width, outputs]; smoothed where it pays, if it may be
    (`smooth`)."""
    import numpy as np

    plain = Activation.over(float(seen.low.min()), float(seen.high.max()))
    tried = [(_noise(plain, seen.tokens, weight), plain)]
    largest = np.maximum(-seen.low, seen.high)
    for strength in STRENGTHS if smooth and tried[0][0] >= NOISE else ():
        factors = smoothing(largest, np.abs(weight).max(axis=1), strength)
        one = Activation.over(float((seen.low / factors).min()), float((seen.high / factors).max()), factors)
        tried.append((_noise(one, seen.tokens, weight), one))
    return min(tried, key=lambda found: found[0])[1]


def smoothing(largest: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """SmoothQuant's factor of every channel [width]: its `largest` magnitude to the power of `strength` over that of
    its `weights` to the power of 1 − `strength`; of geometric mean 1, and 1 for a channel that is always 0 or has no
    weights."""
    import numpy as np

    live = (largest > 0) & (weights > 0)
    factors = np.ones(largest.shape)
    factors[live] = largest[live].astype(np.float64) ** strength / weights[live].astype(np.float64) ** (1 - strength)
    if live.any():
        factors[live] /= np.exp(np.log(factors[live]).mean())
    return factors.astype(np.float32)


def _noise(how: Activation, tokens: np.ndarray, weight: np.ndarray) -> float:
    """The squared error of each output of the quantised product over that output's variance, averaged over the outputs.

    Not over all of the product: one output far larger than the rest would hide what becomes of these, and these are
    what the next LayerNormalization brings up again.
    """
    import numpy as np

    factors = np.ones(len(weight), np.float32) if how.smooth is None else how.smooth
    codes, scales = quantize_weight(weight * factors[:, None], 1)
    exact = tokens @ weight
    error = how.rounded(tokens / factors) @ (codes * scales) - exact
    varying = exact.var(axis=0) > 0
    return float(((error**2).mean(axis=0)[varying] / exact.var(axis=0)[varying]).mean()) if varying.any() else 0.0


def _observe(artifact: Artifact, names: list[str], train: TrainingSource) -> dict[str, Seen]:
    """What ONNX Runtime computes for the named values of the artifact's graph."""
    import numpy as np

    manifest = artifact.manifest
    data = train.load(artifact.label_set)
    rows, _ = inputs.hold_out(data)
    chosen = inputs.sentence_rows(data, rows, SENTENCES)
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    seen: dict[str, Seen] = {}
    for values in _values(artifact, names, encoder, encoder.encode([data.texts[row] for row in chosen])):
        for name, value in values.items():
            flat = value.reshape(-1, value.shape[-1])
            picked = flat[np.unique(np.linspace(0, len(flat) - 1, TOKENS).astype(int))]
            low, high = flat.min(axis=0), flat.max(axis=0)
            if name in seen:
                old = seen[name]
                low, high = np.minimum(old.low, low), np.maximum(old.high, high)
                picked = np.concatenate([old.tokens, picked])
            seen[name] = Seen(low, high, picked)
    return seen


def _values(
    artifact: Artifact, names: list[str], encoder: Encoder, rows: Sequence[Sequence[int]]
) -> Iterator[dict[str, np.ndarray]]:
    """The named values for every row, which is asked alone: padding is nothing to calibrate on."""
    graph = read(artifact.onnx_path)
    _show(graph, names)
    with tempfile.TemporaryDirectory() as folder:
        write(graph, Path(folder) / "model.onnx")
        session = OrtSession(Path(folder), Place("cpu", hardware.cores()))
        try:
            for row in rows:
                outputs = session.outputs(pad([row], encoder.names, encoder.pad_id))
                yield {name: outputs[name] for name in names}
        finally:
            session.close()


def _show(graph: ir.Model, names: list[str]) -> None:
    """Makes the named values outputs of the graph."""
    import onnx_ir as ir

    wanted = set(names)
    for node in list(graph.graph):
        for value in node.outputs:
            if value.name in wanted:
                value.dtype = ir.DataType.FLOAT
                graph.graph.outputs.append(value)
