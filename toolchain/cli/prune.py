"""Prune: a smaller PyTorch model."""

from __future__ import annotations

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
    for ratio in ratios:
        if not 0.01 <= ratio <= 0.99 or abs(100 * ratio - round(100 * ratio)) > 1e-9:
            raise click.BadParameter(
                f"{ratio:g} is no ratio from 0.01 to 0.99 in whole per cents", param_hint="--ratio"
            )
    if method == "mask" and (epochs or layers or cost != "parameters" or max_drop is not None):
        raise click.UsageError("--method mask removes nothing: it takes a --ratio and none of the other options.")
    if max_drop is not None and (epochs or dry_run):
        raise click.UsageError("--max-drop searches by building, without training: leave out --recover and --dry-run.")
    workspace = open_workspace(model, exported, slug, train)
    child(parent, Prune(0.5, method, cost, layers))  # a parent that cannot be pruned is told before anything is built
    if max_drop is not None:
        ratios = (largest_ratio(workspace, Prune(0.5, method, cost, layers), max_drop, say, bar),)
    asked: dict[str, Step] = {}
    for ratio in ratios:
        step = Prune(round(ratio, 2), method, cost, layers)
        name = child(parent, step, label).name
        asked[name] = step
        if epochs:
            asked[child(name, Recover(epochs)).name] = Recover(epochs)
    build(workspace, asked, dry_run)
