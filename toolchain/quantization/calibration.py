"""Calibration chooses the fixed quantisation of the linear layers' inputs from training sentences.

The range of a layer's input covers all values that the input takes on the training sentences. Two other kinds of range
were tested on the reference model: percentile ranges and ranges of least squared error. With each of these two kinds,
the output errors on held-out rows were at least as large as with ranges that cover all values.

Calibration smooths the channels of an input (SmoothQuant) if the error of the layer's int8 product is large.
Calibration chooses the SmoothQuant migration strength with the least error of the layer's int8 product. If the error of
the layer's int8 product is small, smoothing would add a `Mul` node for little gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import open_graph
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import TrainingSource
from toolchain.passes import read
from toolchain.passes.int8 import quantize_weight
from toolchain.passes.quantize_linear import inputs_with_shared_weights, weights_of
from toolchain.passes.quantize_static import Activation
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SENTENCES = 300
# Calibration measures the error of a layer's int8 matrix product on this number of evenly spaced tokens per sentence.
TOKENS = 4
# Migration strengths α of SmoothQuant that calibration tries. The migration strength is the share of the quantisation
# difficulty that moves from the activations to the weights.
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Calibration smooths the input of a layer only if the error `_noise` of the layer's int8 product is at least `NOISE`.
# On the reference model, `NOISE` selects the ten layer inputs whose quantisation, each alone, changes the model's
# outputs most. Smoothing all 25 layer inputs costs twice as much as smoothing the ten that `NOISE` selects, and hardly
# improves the outputs further.
NOISE = 4e-3


@dataclass
class ValueStatistics:
    """Statistics of one input of a linear layer.

    Attributes:
        low: Minimum of each channel, of shape [width].
        high: Maximum of each channel, of shape [width].
        tokens: Values of the input at the sampled tokens, of shape [tokens, width].
    """

    low: np.ndarray
    high: np.ndarray
    tokens: np.ndarray


def calibrate(artifact: Artifact, train: TrainingSource, smooth: bool = True) -> dict[str, Activation]:
    """Chooses the quantisation of each linear layer's input in an fp32 graph.

    Calibration runs on `SENTENCES` training rows, none of them held out. Calibration skips rows with only a few words
    if the data has enough longer rows.

    Args:
        smooth: Whether calibration may smooth inputs if the error of the layer's int8 product is large. Smoothed inputs
            need the pass `smooth` before the quantisation pass.

    Returns:
        The quantisation of each input, by the name of the input.

    Raises:
        DataError: The training data cannot be read, has too few rows, or has a label that the model does not have.
    """
    graph = read(artifact.onnx_path)
    # If several inputs share one weight, smoothing would need a copy of the weight for each input.
    weights, shared = weights_of(graph), inputs_with_shared_weights(graph)
    statistics = _collect_statistics(artifact, list(weights), train)
    return {
        name: choose_activation(value_statistics, weights[name], smooth and name not in shared)
        for name, value_statistics in statistics.items()
    }


def choose_activation(statistics: ValueStatistics, weight: np.ndarray, smooth: bool = True) -> Activation:
    """Chooses the quantisation of a layer's input; `weight` is the layer's weight, of shape [width, outputs].

    Args:
        smooth: Whether the function may smooth the input if the error of the layer's int8 product is large.
    """
    import numpy as np

    unsmoothed = Activation.from_range(float(statistics.low.min()), float(statistics.high.max()))
    trials = [(_noise(unsmoothed, statistics.tokens, weight), unsmoothed)]
    largest = np.maximum(-statistics.low, statistics.high)
    for strength in STRENGTHS if smooth and trials[0][0] >= NOISE else ():
        factors = smoothing_factors(largest, np.abs(weight).max(axis=1), strength)
        smoothed = Activation.from_range(
            float((statistics.low / factors).min()), float((statistics.high / factors).max()), factors
        )
        trials.append((_noise(smoothed, statistics.tokens, weight), smoothed))
    return min(trials, key=lambda trial: trial[0])[1]


def smoothing_factors(largest: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """Returns the SmoothQuant factor of each channel, of shape [width].

    Before scaling, the factor of a channel is (largest activation)^strength / (largest weight)^(1 − strength). The
    factors are scaled to a geometric mean of 1. A channel gets the factor 1 if its values are all 0 or its weights
    are all 0.

    Args:
        largest: Largest absolute value of each channel of the input, of shape [width].
        weights: Largest absolute weight of each channel of the input, of shape [width].
        strength: Migration strength α, 0 to 1.
    """
    import numpy as np

    is_live = (largest > 0) & (weights > 0)
    factors = np.ones(largest.shape)
    factors[is_live] = largest[is_live].astype(np.float64) ** strength / weights[is_live].astype(np.float64) ** (
        1 - strength
    )
    if is_live.any():
        factors[is_live] /= np.exp(np.log(factors[is_live]).mean())
    return factors.astype(np.float32)


def _noise(activation: Activation, tokens: np.ndarray, weight: np.ndarray) -> float:
    """Returns the relative error of a quantised product: squared error divided by variance, averaged over the outputs.

    Without the division by variance, the error of one output with large values would hide the errors of outputs with
    small values. Errors of outputs with small values matter, because the next LayerNormalization enlarges these values.
    """
    import numpy as np

    factors = np.ones(len(weight), np.float32) if activation.smooth is None else activation.smooth
    codes, scales = quantize_weight(weight * factors[:, None], 1)
    exact = tokens @ weight
    error = activation.fake_quantize(tokens / factors) @ (codes * scales) - exact
    is_varying = exact.var(axis=0) > 0
    return (
        float(((error**2).mean(axis=0)[is_varying] / exact.var(axis=0)[is_varying]).mean()) if is_varying.any() else 0.0
    )


def _collect_statistics(artifact: Artifact, names: list[str], train: TrainingSource) -> dict[str, ValueStatistics]:
    """Runs ONNX Runtime on training sentences and collects statistics of the named values."""
    import numpy as np

    manifest = artifact.manifest
    data = train.load(artifact.label_set)
    rows, _ = inputs.hold_out(data)
    sentence_rows = inputs.sentence_rows(data, rows, SENTENCES)
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    statistics: dict[str, ValueStatistics] = {}
    for values in _yield_values(artifact, names, encoder, encoder.encode([data.texts[row] for row in sentence_rows])):
        for name, value in values.items():
            flat = value.reshape(-1, value.shape[-1])
            tokens = flat[np.unique(np.linspace(0, len(flat) - 1, TOKENS).astype(int))]
            low, high = flat.min(axis=0), flat.max(axis=0)
            if name in statistics:
                earlier = statistics[name]
                low, high = np.minimum(earlier.low, low), np.maximum(earlier.high, high)
                tokens = np.concatenate([earlier.tokens, tokens])
            statistics[name] = ValueStatistics(low, high, tokens)
    return statistics


def _yield_values(
    artifact: Artifact, names: list[str], encoder: Encoder, rows: Sequence[Sequence[int]]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the named values for each row; every batch is one row, so that no padding enters calibration."""
    graph = read(artifact.onnx_path)
    _add_outputs(graph, names)
    with open_graph(graph, hardware.cores()) as session:
        for row in rows:
            outputs = session.outputs(pad([row], encoder.names, encoder.pad_id))
            yield {name: outputs[name] for name in names}


def _add_outputs(graph: ir.Model, names: list[str]) -> None:
    """Adds every value whose name is in `names` to the outputs of the graph."""
    import onnx_ir as ir

    name_set = set(names)
    for node in list(graph.graph):
        for value in node.outputs:
            if value.name in name_set:
                value.dtype = ir.DataType.FLOAT
                graph.graph.outputs.append(value)
