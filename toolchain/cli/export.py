"""Export: converts a checkpoint to ONNX."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

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
from toolchain.exporters import EXPORTERS, require_exporter

if TYPE_CHECKING:
    from toolchain.artifacts.steps import Step


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
    from toolchain.artifacts.steps import Export, Import, Optimize
    from toolchain.artifacts.variants import derive_variant

    if exporter:
        require_exporter(exporter, opset)
    step = None if provider == "none" else Optimize.for_provider(provider)
    if omitted_passes:
        if step is None or not set(omitted_passes) <= set(step.passes):
            passes = f"only the passes {', '.join(step.passes)}" if step else "no passes"
            raise click.BadParameter(f"--optimize {provider} applies {passes}.", param_hint="--no-pass")
        step = Optimize(provider, tuple(name for name in step.passes if name not in omitted_passes))
    requested_steps: dict[str, Step] = {"torch-fp32": Import(revision)}
    for parent in parents:
        std_name = derive_variant(parent, Export(opset, exporter), "" if step else label).name
        requested_steps[std_name] = Export(opset, exporter)
        if step:
            requested_steps[derive_variant(std_name, step, label).name] = step
    workspace = open_workspace(model, exported, folder_name)
    build(workspace.with_base(base) if base else workspace, requested_steps, dry_run)
