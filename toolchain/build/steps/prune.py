"""Prune: removes heads and FFN neurons from the PyTorch model, so that all variants built from it are smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolchain import pruning
from toolchain.artifacts.steps import Prune
from toolchain.artifacts.store import copy_companions
from toolchain.backends.pytorch import check_stored, describe, save_weights
from toolchain.build.job import Job, StepResult
from toolchain.models.architectures import shapes_of, write_shapes
from toolchain.pruning.costs import TOKENS, EncoderSizes, LatencyTable, latency_table
from toolchain.pruning.selection import Price
from toolchain.pruning.setup import PruningSetup, shared_setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3


def prune(job: Job[Prune]) -> StepResult:
    """Prunes the parent by the step's method, and stores weights, config and the shape of every layer.

    Raises:
        PruningError: The model is already pruned, its architecture is not supported, or its size rules out the
            requested ratio, number of layers or embedding rank.
        DataError: The training data is unreadable, has too few rows or does not fit the model, or a gradient is not
            finite.
        ArtifactError: The stored model gives other logits than the pruned model.
    """
    step = job.step
    setup = shared_setup(job.parent_artifact, job.train, step.sentences, step.seed)
    setup.require_embedding_rank(step.embedding_rank)
    table = None
    if step.method == "mask":
        model = pruning.mask(setup.model, step.ratio)
    else:
        price, table = price_of(setup, step.cost, job.cache, job.progress)
        job.progress(0, len(shapes_of(setup.model)), "ranking heads and neurons")
        model = pruning.prune(
            setup, step.ratio, step.method, price, _layer_progress(job, setup), step.layers, step.embedding_rank
        )
    copy_companions(job.parent_artifact, job.folder)
    if step.method != "mask":
        write_shapes(model, job.folder)
    save_weights(model.state_dict(), job.folder)
    check_stored(model, job.folder, setup.names)
    facts = {**describe(model, model.state_dict()), "pruning": _pruning_facts(step, setup.model, model, table)}
    return StepResult.from_parent(job, facts)


def price_of(
    setup: PruningSetup, cost: str, cache: Any, progress: Callable[[int, int, str], None]
) -> tuple[Price, LatencyTable | None]:
    """Returns the function that takes a number of heads or neurons of one layer and returns their cost.

    Pruning uses this function to select the units to remove.

    Args:
        setup: The model to prune.
        cost: Kind of cost, either ``parameters`` or ``latency`` on this machine.
        cache: Folder of this machine's latency tables.
        progress: Callback with the number of finished parts of the work, the number of all parts, and the current
            activity.

    Returns:
        The cost function, and the latency table; the table is None if `cost` is ``parameters``.
    """
    if cost == "latency":
        table = latency_table(setup.model, cache, progress)
        return table.price, table
    encoder = EncoderSizes.from_model(setup.model)
    return encoder.unit_parameters, None


def _layer_progress(job: Job[Prune], setup: PruningSetup) -> Callable[[int], None]:
    total = len(shapes_of(setup.model))
    return lambda layer: job.progress(layer, total, "fitting layer by layer")


def _pruning_facts(
    step: Prune, old_model: PreTrainedModel, new_model: PreTrainedModel, table: LatencyTable | None
) -> dict[str, Any]:
    """Returns the pruning facts, such as each layer's shape, the encoder's parameters and the predicted speed-up."""
    old_sizes, new_sizes = EncoderSizes.from_model(old_model), EncoderSizes.from_model(new_model)
    if table:
        speedup, predictor = table.sentence_ms(old_sizes.shapes) / table.sentence_ms(new_sizes.shapes), "latency table"
    else:
        speedup, predictor = old_sizes.multiply_accumulates / new_sizes.multiply_accumulates, "multiply-accumulates"
    zeros = sum(int((p == 0).sum()) for p in new_model.parameters()) - sum(
        int((p == 0).sum()) for p in old_model.parameters()
    )
    return {
        "method": step.method,
        "ratio": step.ratio,
        "achieved": round(1 - new_sizes.parameters / old_sizes.parameters, 4),
        "zeroed": round(max(0, zeros) / old_sizes.parameters, 4),
        "heads": [shape.heads for shape in new_sizes.shapes],
        "ffn": [shape.ffn for shape in new_sizes.shapes],
        "encoder_parameters": {"before": old_sizes.parameters, "after": new_sizes.parameters},
        "macs_per_sentence": {
            "tokens": TOKENS,
            "before": old_sizes.multiply_accumulates,
            "after": new_sizes.multiply_accumulates,
        },
        "predicted_speedup": {"value": round(speedup, 3), "by": predictor},
        **(_embedding_facts(step.embedding_rank, old_model, new_model) if step.embedding_rank else {}),
        **({"latency_table": asdict(table)} if table else {}),
    }


def _embedding_facts(rank: int, old_model: PreTrainedModel, new_model: PreTrainedModel) -> dict[str, Any]:
    """Returns the rank of the word embeddings, and the numbers of their parameters before and after pruning."""
    before, after = (
        sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
        for model in (old_model, new_model)
    )
    return {"embedding_rank": rank, "embedding_parameters": {"before": before, "after": after}}
