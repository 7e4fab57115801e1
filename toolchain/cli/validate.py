"""Validate: compares an artifact's logits with PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.completion import complete_variants
from toolchain.cli.options import json_option, model_options, open_workspace, training_options
from toolchain.cli.output import echo, echo_json
from toolchain.errors import VerdictError

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource


@click.command()
@click.argument("variant", shell_complete=complete_variants)
@training_options
@json_option
@model_options
def validate(
    model: str,
    exported: Path,
    folder_name: str | None,
    variant: str,
    train: TrainingSource,
    as_json: bool,
) -> None:
    """Compare VARIANT's logits with PyTorch's; exit code 3 if validation fails.

    The command compares the logits for many lengths, batch sizes, paddings and difficult texts. It builds missing and
    stale variants first. If VARIANT has a trimmed vocabulary, validation uses sentences from the same data set as
    VARIANT's training data.

    \b
    Example:
      toolchain validate onnx-int8
    """
    from toolchain.build.pipeline import validate_variant
    from toolchain.build.steps.validate import validation_summary
    from toolchain.cli.progress import say

    workspace = open_workspace(model, exported, folder_name, train)
    report = validate_variant(workspace, variant, say)
    if as_json:
        echo_json(report)
    else:
        for name, delta in report["grid_largest_delta"].items():
            echo(f"{name:36} |Δlogit| {'not finite' if delta is None else f'{delta:.2g}'}")
        echo(f"{variant}: {'PASSED' if report['passed'] else 'FAILED'}: {validation_summary(report)}")
    if not report["passed"]:
        raise VerdictError(
            f"The logits of {variant} differ from PyTorch's.", "Build the variant again, or do not use the variant."
        )
