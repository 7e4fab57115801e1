"""Explain: shows the origin, the parts and the relatives of a variant, or the causes of an error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.completion import complete_variants_or_codes
from toolchain.cli.options import data_options, json_option, model_options, open_workspace, results_option
from toolchain.cli.output import echo, echo_json
from toolchain.system.escaping import escape_line

if TYPE_CHECKING:
    from toolchain.data.datasets import Columns


@click.command()
@click.argument("name", metavar="VARIANT|CODE", shell_complete=complete_variants_or_codes)
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
    name: str,
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

    With the CODE of an error, such as E-DATA, the command prints the usual causes of the error and what to do. Each
    error message ends with its code.

    \b
    Examples:
      toolchain explain onnx-int8
      toolchain explain onnx-int8 --profile
      toolchain explain E-DATA
    """
    from toolchain.explain.error_texts import error_lines, explain_code, is_code

    if data and not profile:
        raise click.UsageError("--data needs --profile.")
    if is_code(name):
        if profile:
            raise click.UsageError("--profile needs a VARIANT.")
        error = explain_code(name)
        _print(error.to_json(), error_lines(error), as_json)
        return
    from toolchain.cli.progress import bar, say
    from toolchain.data import inputs
    from toolchain.explain import variant as explaining
    from toolchain.explain.page import page_lines
    from toolchain.results.folder import ResultsFolder

    workspace = open_workspace(model, exported, folder_name)
    artifact = explaining.load_built(workspace, name)
    time = None
    if profile:
        with bar(name) as progress:
            time = explaining.profile(artifact, lambda: inputs.load(data, artifact.label_set, columns, split), progress)
    explanation = explaining.explain_artifact(workspace, artifact, ResultsFolder(folder), time, say)
    _print(explanation.to_json(), page_lines(explanation), as_json)


def _print(body: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Prints an explanation as JSON or as lines of text."""
    if as_json:
        echo_json(body)
        return
    for line in lines:
        echo(escape_line(line))
