"""Chooses the pruning ratio, or the number of fp32 layers, by the accuracy drop on held-out rows."""

from __future__ import annotations

from toolchain import pruning
from toolchain.artifacts.steps import Prune, Quantize
from toolchain.build.pipeline import ensure
from toolchain.build.steps.prune import price_of
from toolchain.build.steps.quantize import activations_of, linear_passes
from toolchain.build.workspace import Workspace
from toolchain.models import checkpoints
from toolchain.progress import Bar, Say
from toolchain.pruning.setup import shared_setup
from toolchain.quantization import sensitivity


def fewest_fp32_layers(workspace: Workspace, parent: str, step: Quantize, max_drop: float, say: Say, bar: Bar) -> int:
    """Finds how many layers of `parent` must stay fp32 for an accuracy drop of at most `max_drop` points.

    See `sensitivity.fewest_fp32_layers`.
    """
    subject = sensitivity_setup(workspace, parent, step, say, bar)
    with bar("quantize") as progress:
        count, drops = sensitivity.fewest_fp32_layers(subject, max_drop, progress)
    for layers, drop in drops:
        say(f"{layers} layers in fp32: accuracy drop of {drop:.2f} points on held-out rows")
    return count


def sensitivity_setup(
    workspace: Workspace, parent: str, step: Quantize, say: Say, bar: Bar
) -> sensitivity.SensitivitySetup:
    """Builds the variant `parent` if it is missing, and returns it as input of the sensitivity analysis for `step`."""
    built = ensure(workspace, [parent], {}, say, bar)[parent]
    passes = linear_passes(step, built.manifest.variant.parts.std)
    activations = activations_of(built, step, workspace.train)
    return sensitivity.SensitivitySetup.load(built, passes, workspace.train, activations)


def largest_ratio(workspace: Workspace, step: Prune, max_drop: float, say: Say, bar: Bar) -> float:
    """Finds the largest pruning ratio for `step` with an accuracy drop of at most `max_drop` points on held-out rows.

    See `pruning.largest_ratio`.
    """
    root = ensure(workspace, [checkpoints.ROOT_VARIANT], {}, say, bar)[checkpoints.ROOT_VARIANT]
    setup = shared_setup(root, workspace.train, step.sentences, step.seed)
    setup.require_embedding_rank(step.embedding_rank)
    with bar("prune") as progress:
        price, _ = price_of(setup, step.cost, workspace.cache, progress)
        ratio, drops = pruning.largest_ratio(
            setup, step.method, price, max_drop, progress, step.layers, step.embedding_rank
        )
    for tried_ratio, drop in drops:
        say(f"pruning ratio {tried_ratio:.2f}: accuracy drop of {drop:.2f} points on held-out rows")
    return ratio
