"""Export: converts a checkpoint to ONNX."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import click

from toolchain.artifacts.steps import OPTIMIZE_PASSES
from toolchain.cli.building import build
from toolchain.cli.completion import complete_folders, complete_variants
from toolchain.cli.options import (
    dry_run_option,
    model_options,
    name_option,
    no_pass_option,
    open_workspace,
)
from toolchain.exporters import EXPORTERS


@click.command()
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--base",
    metavar="FOLDER|ID",
    shell_complete=complete_folders,
    help="Base model of a LoRA adapter; later commands use it too.  [default: the hub model that the adapter names]",
)
@click.option("--opset", type=click.IntRange(17, 20), default=18, show_default=True, help="ONNX opset.")
@click.option(
    "--exporter",
    type=click.Choice(list(EXPORTERS)),
    help="Library that converts the model.  [default: the exporter of the existing artifact; if there is "
    "none, optimum if it is installed, otherwise torch]",
)
@click.option(
    "--optimize",
    "provider",
    type=click.Choice([*OPTIMIZE_PASSES, "none"]),
    default="cpu",
    show_default=True,
    help="Also optimise the graph for this execution provider: onnx-fp32 for cpu, onnx-fp16 for cuda, "
    "onnx-webgpu for webgpu (browsers).",
)
@click.option(
    "--from",
    "parents",
    multiple=True,
    default=["torch-fp32"],
    show_default=True,
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="PyTorch variant to export. Can be repeated.",
)
@no_pass_option(list(dict.fromkeys(chain(*OPTIMIZE_PASSES.values()))), "Omit this pass from the optimised graph")
@name_option
@dry_run_option
@model_options
def export(
    model: str,
    exported: Path,
    folder_name: str | None,
    revision: str | None,
    base: str | None,
    opset: int,
    exporter: str | None,
    provider: str,
    parents: tuple[str, ...],
    omitted_passes: tuple[str, ...],
    label: str,
    dry_run: bool,
) -> None:
    """Export a checkpoint to ONNX: build torch-fp32, onnx-std, and onnx-fp32, which is optimised for the CPU.

    The command stores a variant only if the variant passes validation against PyTorch. It skips variants that are up to
    date.

    \b
    Examples:
      toolchain export --model ./my-checkpoint
      toolchain export --model ./my-adapter --base ./its-base
      toolchain export --from torch-pruned50
      toolchain export --optimize cuda
      toolchain export --optimize webgpu
      toolchain export --no-pass residual-sum --name plain-add
    """
    from toolchain.step_requests import ExportRequest

    steps = ExportRequest(parents, provider, omitted_passes, opset, exporter, revision, label).steps()
    workspace = open_workspace(model, exported, folder_name)
    build(workspace.with_base(base) if base else workspace, steps, dry_run)
