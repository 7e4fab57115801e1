"""Prune: a smaller PyTorch model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import (
    dry_run_option,
    model_options,
    name_option,
    open_workspace,
    training_options,
)

if TYPE_CHECKING:
    from toolchain.artifacts.variants import Step
    from toolchain.data.inputs import TrainingSource
from toolchain.cli.building import build


@click.command()
@click.option("--ratio", "ratios", type=float, multiple=True, help="Share to remove, 0.01 to 0.99; may repeat.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Instead: the largest ratio that loses at most this accuracy on held-out rows.",
)
@click.option(
    "--method",
    type=click.Choice(["fisher", "magnitude", "mask"]),
    default="fisher",
    show_default=True,
    help="What is unimportant: by gradients or by weights. mask: rows are zeroed, nothing gets smaller.",
)
@click.option(
    "--cost",
    type=click.Choice(["parameters", "latency"]),
    default="parameters",
    show_default=True,
    help="What importance is weighed against; latency is measured on this machine once.",
)
@click.option("--layers", type=click.IntRange(1), metavar="N", help="So many layers stay; the others go first, whole.")
@click.option("--recover", "epochs", type=click.IntRange(1, 99), metavar="EPOCHS", help="Then train for so long.")
@click.option("--from", "parent", default="torch-fp32", show_default=True, metavar="VARIANT", help="What is pruned.")
@training_options
@name_option
@dry_run_option
@model_options
def prune(
    model: str,
    exported: Path,
    slug: str | None,
    ratios: tuple[float, ...],
    max_drop: float | None,
    method: str,
    cost: str,
    layers: int | None,
    epochs: int | None,
    parent: str,
    train: TrainingSource,
    label: str,
    dry_run: bool,
) -> None:
    """Remove attention heads and FFN neurons from the PyTorch model: torch-fp32 becomes torch-pruned50.

    The ratio is the share of the encoder's linear parameters that goes; every layer keeps what matters. Needs no
    training: what is left is fitted to the unpruned model's sums. --recover trains it to answer as the unpruned model
    does (torch-pruned50-r1); stopped, it goes on where it was when the same command is given again. One sentence at a
    time, a layer costs more by being there than by its width: --layers and --recover make the fastest models.

    \b
    Examples:
      toolchain prune --ratio 0.3 --ratio 0.5
      toolchain prune --ratio 0.72 --recover 1
      toolchain prune --ratio 0.65 --layers 4 --recover 2
      toolchain prune --max-drop 1.0
    """
    from toolchain.artifacts.variants import Prune, Recover, child
    from toolchain.cli.progress import bar, say
    from toolchain.tuning.settings import largest_ratio

    if bool(ratios) == (max_drop is not None):
        raise click.UsageError("Name the share to remove with --ratio, or the accuracy to keep with --max-drop.")
    if method == "mask" and (epochs or max_drop is not None):
        raise click.UsageError("--method mask removes nothing: leave out --recover and --max-drop.")
    if max_drop is not None and (epochs or dry_run):
        raise click.UsageError("--max-drop builds without training: leave out --recover and --dry-run.")
    prunings = [Prune(ratio, method, cost, layers) for ratio in ratios or [0.5]]
    children = [child(parent, pruning, label) for pruning in prunings]  # refuses a wrong parent before the search
    workspace = open_workspace(model, exported, slug, train)
    if max_drop is not None:
        ratio = largest_ratio(workspace, prunings[0], max_drop, say, bar)
        prunings = [replace(prunings[0], ratio=round(ratio, 2))]
        children = [child(parent, prunings[0], label)]
    steps: dict[str, Step] = {}
    for pruning, variant in zip(prunings, children, strict=True):
        steps[variant.name] = pruning
        if epochs:
            steps[child(variant.name, Recover(epochs)).name] = Recover(epochs)
    build(workspace, steps, dry_run)
