"""Graphs with exits of random heads, and the logits that they must give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from toolchain import passes
from toolchain.backends.ort import session_options
from toolchain.data.labels import MULTI, SINGLE
from toolchain.exits.choice import confidences
from toolchain.exits.heads import Network, States
from toolchain.passes.exits import ExitHead, keep_state


def make_head(
    layer: int, confidence: float = 0.9, several_labels: bool = False, seed: int = 0, width: int = 32
) -> ExitHead:
    """Returns a random head for two labels."""
    source = np.random.default_rng(seed + layer)
    weights = (source.normal(size=(3 * width, 8)) / 8, source.normal(size=(16, 2)) / 2)
    biases = (source.normal(size=8), source.normal(size=2))
    first, second = ((w.astype(np.float32), b.astype(np.float32)) for w, b in zip(weights, biases, strict=True))
    return ExitHead(layer, (first[0], second[0]), (first[1], second[1]), confidence, several_labels)


def add_exits(path: Path, *heads: ExitHead) -> ir.Model:
    """Returns the graph of the file with exits."""
    model, counts = passes.rewrite(passes.read(path), ["exits"], passes.Context(4, 32, exits=heads))
    assert counts == {"exits": len(heads)}
    return model


def open_model(model: ir.Model) -> ort.InferenceSession:
    """Checks the model and opens it with one thread."""
    content = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    return ort.InferenceSession(content, session_options(1), providers=["CPUExecutionProvider"])


def expected_logits(
    path: Path, heads: Sequence[ExitHead], batch: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits that each text of the batch must get, and whether it passes all exits.

    The function computes the heads outside the graph, from the hidden states.
    """
    logits = open_model(passes.read(path)).run(None, batch)[0].copy()
    real = batch["attention_mask"] == 1
    is_left = np.ones(len(logits), bool)
    for head in heads:
        model = passes.read(path)
        keep_state(model, head.layer)
        hidden = open_model(model).run(None, batch)[0]
        states = States(hidden[real], np.concatenate([[0], np.cumsum(real.sum(axis=1))]))
        head_logits = Network(head.weights, head.biases).run(states)
        leaves = is_left & (confidences(head_logits, MULTI if head.several_labels else SINGLE) >= head.confidence)
        logits[leaves] = head_logits[leaves]
        is_left &= ~leaves
    return logits, is_left
