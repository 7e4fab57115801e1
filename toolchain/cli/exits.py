"""Exits: builds a variant in which texts can skip the last layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.building import build
from toolchain.cli.completion import complete_variants
from toolchain.cli.options import dry_run_option, model_options, name_option, open_workspace, training_options

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource


def _layers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,3.") from error


@click.command()
@click.option(
    "--from",
    "parents",
    multiple=True,
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="ONNX variant that gets exits; the option can be repeated.  [default: onnx-int8]",
)
@click.option(
    "--layers",
    metavar="NUMBERS",
    callback=_layers,
    help="Numbers of layers before the exits, such as 1,3; 0 is after the embeddings.  [default: those with the least "
    "expected work]",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Largest accuracy drop below the variant without exits, on held-out rows of the training data.",
)
@training_options
@name_option
@dry_run_option
@model_options
def exits(
    model: str,
    exported: Path,
    folder_name: str | None,
    parents: tuple[str, ...],
    layers: tuple[int, ...] | None,
    max_drop: float,
    train: TrainingSource,
    label: str,
    dry_run: bool,
) -> None:
    """Let texts skip the last layers if an early prediction is confident: onnx-int8 becomes onnx-exits-int8.

    An exit is a small network after a layer, which predicts the label. If its confidence reaches a threshold, the later
    layers do not run. The command trains the exits on the logits of the variant. It chooses their layers and the
    threshold on held-out rows. In a batch, the later layers run only for texts below the threshold.

    \b
    Examples:
      toolchain exits
      toolchain exits --from onnx-pruned50-int8 --max-drop 0.3
      toolchain exits --layers 1,3 --name fixed
    """
    from toolchain.artifacts.steps import Exits
    from toolchain.step_requests import exits_steps

    steps = exits_steps(parents, Exits(layers, max_drop), label)
    build(open_workspace(model, exported, folder_name, train), steps, dry_run)
