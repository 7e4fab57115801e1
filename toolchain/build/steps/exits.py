"""Exits: lets texts skip the last layers of an ONNX graph if an early prediction is confident."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.steps import Exits
from toolchain.build.job import Job, StepResult
from toolchain.build.rewriting import rewrite_parent_graph
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.data.labels import MULTI, Answer, answers, number
from toolchain.errors import DataError, GraphError
from toolchain.exits import choice, heads
from toolchain.passes import read
from toolchain.passes.exits import ExitHead, layer_weights
from toolchain.passes.model_shape import context_of
from toolchain.training.augmentation import AugmentedExamples, encode_rows

if TYPE_CHECKING:
    import numpy as np

VERSION = 3
BATCH_SIZE = 32  # of training texts
MIN_TRAINING_ROWS = 100


def add_exits(job: Job[Exits]) -> StepResult:
    """Trains heads on training rows, chooses exits on held-out rows, and adds these exits to the parent's graph.

    Raises:
        GraphError: The parent does not classify texts, or its graph has no place for one of the exits.
        DataError: The training data is unreadable, has too few rows or does not fit the model.
        VerdictError: Every choice of exits loses more accuracy than the step allows, or saves no work.
    """
    step, parent = job.step, job.parent_artifact
    task = parent.label_set.task
    choice.require_confidences(parent)
    graph = read(parent.onnx_path)
    weights = layer_weights(graph)
    if wrong := [layer for layer in step.layers or () if not 0 <= layer < len(weights)]:
        raise GraphError(
            f"{parent.manifest.variant} has no exit after {wrong[0]} layers.",
            f"Use layers from 0 to {len(weights) - 1}.",
        )
    data = job.train.load(parent.label_set)
    train_rows, held_out_rows = inputs.hold_out(data)
    train_rows = inputs.exclude_overlaps(data, train_rows, held_out_rows)[: step.sentences]
    if len(train_rows) < MIN_TRAINING_ROWS:
        raise DataError(
            f"{data.name} has only {len(train_rows)} training rows whose text is not contained in a held-out row.",
            f"Pass data with at least {MIN_TRAINING_ROWS} such rows.",
        )
    encoder = Encoder.open(parent.path, [spec.name for spec in parent.manifest.inputs], parent.manifest.max_length)
    held_out = data.select(held_out_rows)
    held_out_ids = encoder.encode(held_out.texts)
    training_ids = heads.select_texts(_training_ids(job, data, train_rows, encoder), context_of(parent.path).width)
    train_logits = heads.compute_logits(parent, training_ids, encoder, BATCH_SIZE, job.progress)
    # The rows of an int8 batch share activation scales, so each held-out row is a batch of its own.
    last_logits = heads.compute_logits(parent, held_out_ids, encoder, 1, job.progress)
    targets = _targets(held_out.labels, last_logits.shape[1], task)
    networks, logits = [], []
    for layer in range(len(weights)):
        states = heads.compute_states(parent, layer, training_ids, encoder, BATCH_SIZE, job.progress, "float16")
        job.progress(layer, len(weights), "training the heads of the exits")
        network = heads.train(states, train_logits, task, step.seed)
        held_out_states = heads.compute_states(parent, layer, held_out_ids, encoder, 1, job.progress)
        network, head_logits = heads.calibrate(network, network.run(held_out_states), targets, task)
        networks.append(network)
        logits.append(head_logits)
    chosen = choice.choose(
        _compare_with_labels(logits, last_logits, held_out.labels, task, weights), step.max_drop, step.layers
    )
    exits = [
        ExitHead(layer, networks[layer].weights, networks[layer].biases, chosen.point.confidence, task == MULTI)
        for layer in chosen.layers
    ]
    result = rewrite_parent_graph(job, ["exits"], exits=exits)
    return dataclasses.replace(result, facts={**result.facts, "exits": _facts(chosen, len(held_out_rows))})


def _training_ids(job: Job[Exits], data: Data, rows: list[int], encoder: Encoder) -> Sequence[Sequence[int]]:
    """Returns the token ids of the training rows, and of longer texts that join two of these rows.

    The graph is certain about nearly all training rows. A head that learns from these rows alone is too confident about
    longer texts.
    """
    plain = encode_rows(data, rows, encoder)
    pairs = 0 if data.has_pairs else round(job.step.pairs * len(rows))
    augmented = AugmentedExamples(plain.ids, plain.labels, pairs, None, 0.0, job.step.seed, encoder.max_length)
    return augmented.of_epoch(0).ids


def _targets(labels: Sequence[Answer], count: int, task: str) -> np.ndarray:
    """Returns 1 for each label of a row and 0 for every other label, of shape [rows, labels]."""
    import numpy as np

    numbers = [int(number(label)) for label in labels]
    bits = numbers if task == MULTI else [1 << each for each in numbers]
    return np.array([[each >> index & 1 for index in range(count)] for each in bits], np.float32)


def _compare_with_labels(
    logits: list[np.ndarray], last_logits: np.ndarray, labels: Sequence[Answer], task: str, weights: tuple[int, ...]
) -> choice.HeldOut:
    """Compares the answers of the heads, and of the graph, with the labels of the held-out rows."""
    import numpy as np

    right = [
        [a == label for a, label in zip(answers(each, task), labels, strict=True)] for each in (*logits, last_logits)
    ]
    return choice.HeldOut(np.stack([choice.confidences(each, task) for each in logits]), np.array(right), weights)


def _facts(chosen: choice.Choice, rows: int) -> dict[str, Any]:
    """Returns the fact ``exits``."""
    return {
        "layers": list(chosen.layers),
        "held_out_rows": rows,
        **dataclasses.asdict(chosen.point),
        "curve": [dataclasses.asdict(point) for point in chosen.curve],
    }
