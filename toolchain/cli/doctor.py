"""Doctor: reports problems of this machine and installation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import debug_option, json_option
from toolchain.cli.output import echo, echo_json
from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    pass


@click.command()
@click.option(
    "--exported",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("exported"),
    help="Folder of the artifacts.",
)
@json_option
@debug_option
def doctor(exported: Path, as_json: bool) -> None:
    """Check this machine and this installation. Each problem comes with a fix. Exit code 1: there is a problem.

    \b
    Example:
      toolchain doctor
    """
    from toolchain.doctor import examine

    findings = examine(exported)
    if as_json:
        echo_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            hint = f"\n{'':9}→ {finding.mend}" if finding.mend else ""
            echo(f"{finding.level:8} {finding.what}{hint}")
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        raise ToolchainError(
            f"{len(problems)} of {len(findings)} findings stop the toolchain from working.", problems[0].mend
        )
