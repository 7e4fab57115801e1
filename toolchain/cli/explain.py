"""Explain: shows how a variant was built, where its bytes and its time go, and what to compare it with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import data_options, json_option, model_options, open_workspace, results_option
from toolchain.cli.output import echo, echo_json
from toolchain.system.escaping import escape_line

if TYPE_CHECKING:
    from toolchain.data.datasets import Columns


@click.command()
@click.argument("variant")
@click.option(
    "--profile",
    is_flag=True,
    help="ONNX variants only: also measure where the time of single texts goes, by operator. This takes some seconds.",
)
@data_options
@json_option
@results_option
@model_options
def explain(
    model: str,
    exported: Path,
    folder_name: str | None,
    variant: str,
    profile: bool,
    data: str | None,
    columns: Columns,
    split: str | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Explain VARIANT: how it was built, where its bytes and its time go, and what to compare it with.

    The command builds nothing. It reads the manifests of VARIANT and of its ancestors, and the result files in
    --results. With --profile, it runs VARIANT on the CPU with one thread, on a sample of the evaluation data.

    \b
    Examples:
      toolchain explain onnx-int8
      toolchain explain onnx-int8 --profile
    """
    from toolchain.cli.progress import bar, say
    from toolchain.data import inputs
    from toolchain.explain import variant as explaining
    from toolchain.explain.page import page_lines
    from toolchain.results.folder import ResultsFolder

    if data and not profile:
        raise click.UsageError("--data needs --profile.")
    workspace = open_workspace(model, exported, folder_name)
    artifact = explaining.load_built(workspace, variant)
    time = None
    if profile:
        with bar(variant) as progress:
            time = explaining.profile(artifact, lambda: inputs.load(data, artifact.label_set, columns, split), progress)
    explanation = explaining.explain_artifact(workspace, artifact, ResultsFolder(folder), time, say)
    if as_json:
        echo_json(explanation.to_json())
        return
    for line in page_lines(explanation):
        echo(escape_line(line))
