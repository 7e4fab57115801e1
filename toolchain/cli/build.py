"""Commands that build: export, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import dry_run_option, model_options, open_workspace

if TYPE_CHECKING:
    from toolchain.pipeline import Workspace
    from toolchain.variants import Step


def _build(workspace: Workspace, asked: dict[str, Step], dry_run: bool) -> None:
    """Builds what is asked for, or says what that would be; prints where it lies."""
    from toolchain.pipeline import ensure, plan
    from toolchain.report.progress import say
    from toolchain.variants import settings_of

    if dry_run:
        for item in plan(workspace, asked, asked):
            settings = ", ".join(f"{key}={value}" for key, value in settings_of(item.step).items())
            click.echo(
                f"{item.variant.name}: {f'build ({item.reason})' if item.reason else 'skip (fresh)'}; {settings}"
            )
        return
    built = ensure(workspace, asked, asked, say)
    for name in asked:
        click.echo(built[name].path)


@click.command()
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--opset", type=click.IntRange(17, 20), default=18, show_default=True, help="ONNX operator set.")
@click.option(
    "--optimize",
    "provider",
    type=click.Choice(["cpu", "none"]),
    default="cpu",
    show_default=True,
    help="Rewrite the graph for this execution provider as well.",
)
@dry_run_option
@model_options
def export(
    model: str, exported: Path, slug: str | None, revision: str | None, opset: int, provider: str, dry_run: bool
) -> None:
    """Export a checkpoint to ONNX: torch-fp32, onnx-std, and onnx-fp32 optimised for the CPU.

    Each is validated against PyTorch before it is published; what is fresh is skipped.

    \b
    Example:
      toolchain export --model ./my-checkpoint
    """
    from toolchain.variants import Export, Import, Optimize

    asked: dict[str, Step] = {"torch-fp32": Import(revision), "onnx-std": Export(opset)}
    if provider != "none":
        asked["onnx-fp32"] = Optimize(provider)
    _build(open_workspace(model, exported, slug), asked, dry_run)


@click.command()
@click.option("--backend", type=click.Choice(["ort"]), default="ort", show_default=True, help="Whose int8 it is.")
@click.option("--from", "parent", default="onnx-fp32", show_default=True, metavar="VARIANT", help="What is quantised.")
@click.option(
    "--scheme",
    type=click.Choice(["dynamic"]),
    default="dynamic",
    show_default=True,
    help="dynamic: int8 weights per channel, activations scaled at run time.",
)
@dry_run_option
@model_options
def quantize(
    model: str, exported: Path, slug: str | None, backend: str, parent: str, scheme: str, dry_run: bool
) -> None:
    """Quantise a variant to int8: linear layers and embedding table; onnx-fp32 becomes onnx-int8.

    Validated before it is published: at most 2 % of 200 sentences may be answered differently from PyTorch.

    \b
    Example:
      toolchain quantize --backend ort
    """
    from toolchain.variants import Quantize, child

    step = Quantize(backend, scheme)
    _build(open_workspace(model, exported, slug), {child(parent, step).name: step}, dry_run)
