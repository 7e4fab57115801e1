"""Commands that look: validate, variants, doctor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.options import debug_option, json_option, model_options, open_workspace, training_options
from toolchain.errors import ToolchainError, VerdictError

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource


@click.command()
@click.argument("variant")
@training_options
@json_option
@model_options
def validate(
    model: str,
    exported: Path,
    slug: str | None,
    variant: str,
    train: TrainingSource,
    as_json: bool,
) -> None:
    """Compare VARIANT's answers with PyTorch's over lengths, batches, paddings and odd texts; exit 3 if it fails.

    What is missing or stale is built first. A trimmed vocabulary is asked sentences of its training data's domain.

    \b
    Example:
      toolchain validate onnx-int8
    """
    from toolchain.build.pipeline import validate_variant
    from toolchain.build.steps.validate import sentence
    from toolchain.cli.progress import say

    workspace = open_workspace(model, exported, slug, train)
    report = validate_variant(workspace, variant, say)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for name, delta in report["grid_largest_delta"].items():
            click.echo(f"{name:36} |Δlogit| {'not finite' if delta is None else f'{delta:.2g}'}")
        click.echo(f"{variant}: {'valid' if report['passed'] else 'NOT valid'}: {sentence(report)}")
    if not report["passed"]:
        raise VerdictError(f"{variant} does not answer as PyTorch does.", "Build it again, or do not use it.")


@click.command()
@json_option
@model_options
def variants(model: str, exported: Path, slug: str | None, as_json: bool) -> None:
    """List every variant: what it is made from, how, and whether it is built, stale or missing.

    \b
    Example:
      toolchain variants --model ./my-checkpoint
    """
    from toolchain.artifacts.variants import settings_of, step_name
    from toolchain.build.pipeline import states

    rows: list[dict[str, Any]] = []
    for variant, artifact, state in states(open_workspace(model, exported, slug)):
        step = artifact.manifest.step if artifact else variant.step
        rows.append(
            {
                "variant": variant.name,
                "parent": variant.parent,
                "step": step_name(step),
                "settings": settings_of(step),
                "state": state,
                "size_bytes": artifact.manifest.size_bytes if artifact else None,
                "id": artifact.manifest.id if artifact else None,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        size = f"{row['size_bytes'] / 1e6:.1f} MB" if row["size_bytes"] else "–"
        made = f"{row['step']} of {row['parent']}" if row["parent"] else str(row["step"])
        click.echo(f"{row['variant']:12} {made:24} {size:>9}  {row['state']}")


@click.command()
@click.option(
    "--exported",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("exported"),
    help="Where artifacts lie.",
)
@json_option
@debug_option
def doctor(exported: Path, as_json: bool) -> None:
    """Look at this machine and installation; each finding with the line that mends it. Exit 1 if something is broken.

    \b
    Example:
      toolchain doctor
    """
    from toolchain.doctor import examine

    findings = examine(exported)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mend = f"\n{'':9}→ {finding.mend}" if finding.mend else ""
            click.echo(f"{finding.level:8} {finding.what}{mend}")
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        raise ToolchainError(
            f"{len(problems)} of {len(findings)} findings stop the toolchain from working.", problems[0].mend
        )
