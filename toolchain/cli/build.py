"""Commands that build in PyTorch and ONNX: export, prune; quantize is in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.artifacts.variants import CPU_PASSES, CUDA_PASSES
from toolchain.cli.options import (
    dry_run_option,
    model_options,
    name_option,
    no_pass_option,
    open_workspace,
    training_options,
)

if TYPE_CHECKING:
    from toolchain.artifacts.variants import Step
    from toolchain.build.workspace import Workspace
    from toolchain.data.inputs import TrainingSource


def build(workspace: Workspace, asked: dict[str, Step], dry_run: bool) -> None:
    """Builds what is asked for, or says what that would be; prints where it lies."""
    from toolchain.artifacts.variants import settings_of
    from toolchain.build.pipeline import ensure, plan
    from toolchain.cli.progress import bar, say

    if dry_run:
        for item in plan(workspace, asked, asked):
            settings = ", ".join(f"{key}={value}" for key, value in settings_of(item.step).items())
            click.echo(
                f"{item.variant.name}: {f'build ({item.reason})' if item.reason else 'skip (fresh)'}; {settings}"
            )
        return
    built = ensure(workspace, asked, asked, say, bar)
    for name in asked:
        click.echo(built[name].path)


@click.command()
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--base",
    metavar="FOLDER|ID",
    help="What a LoRA adapter is merged into; kept for later commands.  [default: the hub model it names]",
)
@click.option("--opset", type=click.IntRange(17, 20), default=18, show_default=True, help="ONNX operator set.")
@click.option(
    "--optimize",
    "provider",
    type=click.Choice(["cpu", "cuda", "none"]),
    default="cpu",
    show_default=True,
    help="Rewrite the graph for this execution provider as well: onnx-fp32 for cpu, onnx-fp16 for cuda.",
)
@click.option(
    "--from",
    "parents",
    multiple=True,
    default=["torch-fp32"],
    show_default=True,
    metavar="VARIANT",
    help="The PyTorch variant that is exported; may repeat.",
)
@no_pass_option([*CPU_PASSES, *CUDA_PASSES], "Leave this rewrite out of the optimised graph")
@name_option
@dry_run_option
@model_options
def export(
    model: str,
    exported: Path,
    slug: str | None,
    revision: str | None,
    base: str | None,
    opset: int,
    provider: str,
    parents: tuple[str, ...],
    left_out: tuple[str, ...],
    label: str,
    dry_run: bool,
) -> None:
    """Export a checkpoint to ONNX: torch-fp32, onnx-std, and onnx-fp32 optimised for the CPU.

    Each is validated against PyTorch before it is published; what is fresh is skipped.

    \b
    Examples:
      toolchain export --model ./my-checkpoint
      toolchain export --model ./my-adapter --base ./its-base
      toolchain export --from torch-pruned50
      toolchain export --optimize cuda
      toolchain export --no-pass residual-sum --name plain-add
    """
    from toolchain.artifacts.variants import Export, Import, Optimize, child

    step = None if provider == "none" else Optimize.for_provider(provider)
    if left_out:
        if step is None or not set(left_out) <= set(step.passes):
            has = f"{provider} has {', '.join(step.passes)}" if step else "nothing is rewritten"
            raise click.BadParameter(f"with --optimize {provider}, {has}.", param_hint="--no-pass")
        step = Optimize(provider, tuple(name for name in step.passes if name not in left_out))
    asked: dict[str, Step] = {"torch-fp32": Import(revision)}
    for parent in parents:
        std = child(parent, Export(opset), "" if step else label).name
        asked[std] = Export(opset)
        if step:
            asked[child(std, step, label).name] = step
    workspace = open_workspace(model, exported, slug)
    build(workspace.on(base) if base else workspace, asked, dry_run)


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
