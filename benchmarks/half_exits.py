"""Gives a model an exit that half of the sentences use, to measure the speed of exits without training.

The head of the exit has random weights, so its predictions mean nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from toolchain.artifacts import store
from toolchain.artifacts.store import Artifact
from toolchain.data import encoding, inputs
from toolchain.exits import choice, heads
from toolchain.passes import read, rewrite, write
from toolchain.passes.exits import ExitHead, layer_weights
from toolchain.passes.model_shape import context_of

NAME = "onnx-exits-int8+half"


def add_half_exit(parent: Artifact, encoder: encoding.Encoder, folder: Path) -> Artifact:
    """Writes the graph of `parent` with one exit after half of its layers, and returns it as an artifact.

    Half of the validation sentences use the exit: its threshold is the median of its confidences.

    Args:
        parent: The artifact of an ONNX graph without exits.
        encoder: The `Encoder` of the artifact.
        folder: An empty folder.
    """
    graph = read(parent.onnx_path)
    layer = len(layer_weights(graph)) // 2
    rows = encoder.encode(inputs.load(None, parent.label_set).texts)
    states = heads.compute_states(parent, layer, rows, encoder, 1, lambda *_: None)
    rng = np.random.default_rng(1)
    sizes = (heads.UNITS, len(parent.manifest.labels))
    first = rng.normal(size=(3 * states.tokens.shape[1], sizes[0])).astype(np.float32)
    last = rng.normal(size=(2 * sizes[0], sizes[1])).astype(np.float32)
    network = heads.Network((first, last), (np.zeros(sizes[0], np.float32), np.zeros(sizes[1], np.float32)))
    logits = network.run(states)
    # Without this divisor, most confidences would be 1, and no threshold would divide the sentences in halves.
    divisor = float(np.median(np.abs(logits[:, 0] - logits[:, 1])))
    network = network.divide_logits(divisor)
    confidence = float(np.median(choice.confidences(logits / divisor, parent.label_set.task)))
    head = ExitHead(layer, network.weights, network.biases, confidence)
    graph, _ = rewrite(graph, ["exits"], replace(context_of(parent.path), exits=(head,)))
    write(graph, folder / parent.onnx_path.name)
    store.copy_companions(parent, folder)
    facts = {"made_by": "the toolchain, with a random head"}
    files = store.list_files(folder)
    return Artifact(folder, replace(parent.manifest, variant=NAME, files=files, facts=facts))
