"""Choosing settings by what they cost in accuracy, on rows held out of the training data."""

from __future__ import annotations

from toolchain import checkpoints, pruning
from toolchain.pipeline import Bar, Say, Workspace, ensure
from toolchain.pruning.subject import subject
from toolchain.steps.prune import price_of
from toolchain.variants import Prune


def largest_ratio(workspace: Workspace, step: Prune, max_drop: float, say: Say, bar: Bar) -> float:
    """The largest ratio at which `step`'s method loses at most `max_drop` points on rows held out of the training data;
    see `pruning.largest_ratio`."""
    root = ensure(workspace, [checkpoints.ROOT_VARIANT], {}, say, bar)[checkpoints.ROOT_VARIANT]
    given = subject(root, workspace.train, step.sentences, step.seed)
    with bar("prune") as progress:
        price, _ = price_of(given, step.cost, workspace.cache, progress)
        ratio, tried = pruning.largest_ratio(given, step.method, price, max_drop, progress)
    for each, drop in tried:
        say(f"ratio {each:.2f}: {drop:+.2f} points lost on held-out rows")
    return ratio
