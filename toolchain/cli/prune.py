"""Prune: builds a smaller PyTorch model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.completion import complete_variants
from toolchain.cli.options import (
    dry_run_option,
    model_options,
    name_option,
    open_workspace,
    training_options,
)

if TYPE_CHECKING:
    from toolchain.artifacts.steps import Step
    from toolchain.data.inputs import TrainingSource
from toolchain.cli.building import build


@click.command()
@click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    help="Share of the encoder's linear parameters to remove, 0.01 to 0.99. Can be repeated.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Instead of --ratio: search for the largest ratio with at most this accuracy drop on held-out rows.",
)
@click.option(
    "--method",
    type=click.Choice(["fisher", "magnitude", "mask"]),
    default="fisher",
    show_default=True,
    help="Importance measure: fisher uses gradients, magnitude uses weights. The method mask only sets the weakest "
    "rows of weight matrices to zero, so the model gets neither smaller nor faster.",
)
@click.option(
    "--cost",
    type=click.Choice(["parameters", "latency"]),
    default="parameters",
    show_default=True,
    help="Cost that pruning reduces: parameters, or latency (measured once on this machine).",
)
@click.option(
    "--layers",
    type=click.IntRange(1),
    metavar="N",
    help="Remove whole layers until N layers are left, then prune these N layers.",
)
@click.option(
    "--recover",
    "epochs",
    type=click.IntRange(1, 99),
    metavar="EPOCHS",
    help="After pruning, train the pruned model for at most EPOCHS epochs.",
)
@click.option(
    "--exits",
    "for_exits",
    is_flag=True,
    help="With --recover: also train the early layers for early exits, so that `toolchain exits` saves more work.",
)
@click.option(
    "--from",
    "parent",
    default="torch-fp32",
    show_default=True,
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="Variant to prune.",
)
@training_options
@name_option
@dry_run_option
@model_options
def prune(
    model: str,
    exported: Path,
    folder_name: str | None,
    ratios: tuple[float, ...],
    max_drop: float | None,
    method: str,
    cost: str,
    layers: int | None,
    epochs: int | None,
    for_exits: bool,
    parent: str,
    train: TrainingSource,
    label: str,
    dry_run: bool,
) -> None:
    """Remove attention heads and FFN neurons from the PyTorch model: torch-fp32 becomes torch-pruned50.

    Pruning removes the least important heads and neurons. Pruning needs no training: a least-squares fit adjusts the
    remaining weights to the unpruned model. With --recover, the command also trains the pruned model on the unpruned
    model's logits (torch-pruned50-r1). If you interrupt the training, the same command continues it. At batch 1, depth
    costs more than width: --layers with --recover gives the fastest models.

    \b
    Examples:
      toolchain prune --ratio 0.3 --ratio 0.5
      toolchain prune --ratio 0.72 --recover 1
      toolchain prune --ratio 0.65 --layers 4 --recover 2
      toolchain prune --ratio 0.73 --cost latency --layers 4 --recover 4 --exits
      toolchain prune --max-drop 1.0
    """
    from toolchain.artifacts.steps import EXITS_WEIGHT, Prune, Recover
    from toolchain.artifacts.variants import derive_variant
    from toolchain.cli.progress import bar, say
    from toolchain.tuning.settings import largest_ratio

    if bool(ratios) == (max_drop is not None):
        raise click.UsageError("Give either --ratio or --max-drop.")
    if method == "mask" and (epochs or max_drop is not None):
        raise click.UsageError("--method mask removes nothing: it cannot be used with --max-drop or --recover.")
    if max_drop is not None and (epochs or dry_run):
        raise click.UsageError(
            "--max-drop builds pruned models without training: it cannot be used with --recover or --dry-run."
        )
    if for_exits and not epochs:
        raise click.UsageError("--exits trains the early layers: give --recover too.")
    prunings = [Prune(ratio, method, cost, layers) for ratio in ratios or [0.5]]
    # `derive_variant` is called before the search, so that a wrong parent raises its error at once.
    children = [derive_variant(parent, pruning, label) for pruning in prunings]
    workspace = open_workspace(model, exported, folder_name, train)
    if max_drop is not None:
        ratio = largest_ratio(workspace, prunings[0], max_drop, say, bar)
        prunings = [replace(prunings[0], ratio=round(ratio, 2))]
        children = [derive_variant(parent, prunings[0], label)]
    steps: dict[str, Step] = {}
    for pruning, variant in zip(prunings, children, strict=True):
        steps[variant.name] = pruning
        if epochs:
            recovery = Recover(epochs, exits=EXITS_WEIGHT if for_exits else None)
            steps[derive_variant(variant.name, recovery).name] = recovery
    build(workspace, steps, dry_run)
