"""Prune: removes heads and FFN neurons from the PyTorch model, so that all variants built from it are smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolchain import pruning
from toolchain.artifacts.steps import Prune
from toolchain.artifacts.store import copy_companions
from toolchain.backends.pytorch import check_stored, describe, save_weights
from toolchain.build.job import Built, Job
from toolchain.models.architectures import shapes_of, write_shapes
from toolchain.pruning.costs import TOKENS, EncoderSizes, LatencyTable, latency_table
from toolchain.pruning.selection import Price
from toolchain.pruning.setup import PruningSetup, shared_setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3


def prune(job: Job[Prune]) -> Built:
    """Prunes the parent by the step's method, and stores weights, config and the shape of every layer.

    Raises:
        PruningError: The model is already pruned, its architecture is not supported, or it cannot lose that share.
        DataError: The training data cannot rank the units of the model.
        ArtifactError: The stored model gives other logits than the pruned model.
    """
    step = job.step
    given = shared_setup(job.given, job.train, step.sentences, step.seed)
    table = None
    if step.method == "mask":
        model = pruning.mask(given.model, step.ratio)
    else:
        price, table = price_of(given, step.cost, job.cache, job.progress)
        job.progress(0, len(shapes_of(given.model)), "ranking heads and neurons")
        model = pruning.prune(given, step.ratio, step.method, price, _layers(job, given), step.layers)
    copy_companions(job.given, job.folder)
    if step.method != "mask":
        write_shapes(model, job.folder)
    save_weights(model.state_dict(), job.folder)
    check_stored(model, job.folder, given.names)
    facts = {**describe(model, model.state_dict()), "pruning": _facts(step, given.model, model, table)}
    return Built.like(job, facts)


def price_of(
    given: PruningSetup, cost: str, cache: Any, progress: Callable[[int, int, str], None]
) -> tuple[Price, LatencyTable | None]:
    """Returns the cost function that the selection weighs importance against.

    Args:
        given: The model to prune.
        cost: ``parameters``, or ``latency`` on this machine.
        cache: Folder of this machine's latency tables.
        progress: Called with units done, units in all, and the current work.

    Returns:
        The cost function, and its latency table; None for ``parameters``.
    """
    if cost == "latency":
        table = latency_table(given.model, cache, progress)
        return table.price, table
    encoder = EncoderSizes.from_model(given.model)
    return encoder.unit_parameters, None


def _layers(job: Job[Prune], given: PruningSetup) -> Callable[[int], None]:
    total = len(shapes_of(given.model))
    return lambda layer: job.progress(layer, total, "fitting layer by layer")


def _facts(step: Prune, before: PreTrainedModel, after: PreTrainedModel, table: LatencyTable | None) -> dict[str, Any]:
    """Returns the pruning facts: each layer's shape, parameters, multiply-accumulates and predicted speed-up."""
    old, new = EncoderSizes.from_model(before), EncoderSizes.from_model(after)
    if table:
        predicted, by = table.sentence_ms(old.shapes) / table.sentence_ms(new.shapes), "latency table"
    else:
        predicted, by = old.multiply_accumulates / new.multiply_accumulates, "multiply-accumulates"
    zeros = sum(int((p == 0).sum()) for p in after.parameters()) - sum(int((p == 0).sum()) for p in before.parameters())
    return {
        "method": step.method,
        "ratio": step.ratio,
        "achieved": round(1 - new.parameters / old.parameters, 4),
        "zeroed": round(max(0, zeros) / old.parameters, 4),
        "heads": [shape.heads for shape in new.shapes],
        "ffn": [shape.ffn for shape in new.shapes],
        "encoder_parameters": {"before": old.parameters, "after": new.parameters},
        "macs_per_sentence": {
            "tokens": TOKENS,
            "before": old.multiply_accumulates,
            "after": new.multiply_accumulates,
        },
        "predicted_speedup": {"value": round(predicted, 3), "by": by},
        **({"latency_table": asdict(table)} if table else {}),
    }
