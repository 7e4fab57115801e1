"""Prune: builds a smaller PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.building import build
from toolchain.cli.completion import complete_variants
from toolchain.cli.options import (
    dry_run_option,
    model_options,
    name_option,
    open_workspace,
    training_options,
)

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource


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
    "--embedding-rank",
    type=click.IntRange(1),
    metavar="N",
    help="Store N numbers for each token, and compute the token's embedding from them with one linear layer. N is "
    "smaller than the width of the embeddings. All tokens stay in the vocabulary.",
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
    embedding_rank: int | None,
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
      toolchain prune --ratio 0.73 --layers 4 --embedding-rank 128 --recover 4 --name narrow
      toolchain prune --max-drop 1.0
    """
    from toolchain.cli.progress import bar, say
    from toolchain.step_requests import PruneRequest

    if max_drop is not None and dry_run:
        raise click.UsageError("--max-drop searches the ratio: it cannot be used with --dry-run.")
    request = PruneRequest(ratios, max_drop, method, cost, layers, epochs, for_exits, parent, label, embedding_rank)
    workspace = open_workspace(model, exported, folder_name, train)
    build(workspace, request.steps(workspace, say, bar), dry_run)
