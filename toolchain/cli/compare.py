"""Compare: prints result files as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from toolchain.cli.completion import complete_variants
from toolchain.cli.options import json_option, model_options, open_workspace, require_finite, results_option
from toolchain.cli.output import echo, echo_json
from toolchain.results.providers import PROVIDERS

if TYPE_CHECKING:
    from toolchain.compare.limits import Verdict
    from toolchain.compare.regressions import Regressions
    from toolchain.compare.rows import Row
    from toolchain.results.result_file import ResultFile

F = TypeVar("F", bound=Callable[..., Any])


def _parse_share(_: click.Context, __: click.Parameter, value: str) -> float:
    from toolchain.compare.regressions import parse_share

    try:
        return parse_share(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def gate_options(command: F) -> F:
    """Adds the options for limits and for the comparison with an older run."""
    number = click.FloatRange(0)
    for option in (
        click.option(
            "--max-regression",
            callback=_parse_share,
            default="5%",
            show_default=True,
            help="With --against: largest percentage by which a figure may be worse than in the older run.",
        ),
        click.option(
            "--against",
            type=click.Path(path_type=Path),
            metavar="OLD",
            help="Compare with this older run; exit code 3 if a cell is worse.",
        ),
        click.option(
            "--max-memory-mb", type=number, callback=require_finite, metavar="MB", help="Highest allowed peak memory."
        ),
        click.option(
            "--max-size-mb", type=number, callback=require_finite, metavar="MB", help="Largest allowed artifact."
        ),
        click.option(
            "--max-p95-ms",
            type=number,
            callback=require_finite,
            metavar="MS",
            help="Highest allowed p95 latency at batch 1.",
        ),
        click.option(
            "--max-drop",
            type=number,
            callback=require_finite,
            metavar="POINTS",
            help="Largest allowed accuracy drop. Exit code 3 if no row meets all limits.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    metavar="CELL",
    shell_complete=complete_variants,
    help="Compare with this variant or cell.  [default: torch-fp32@cpu]",
)
@click.option("--provider", type=click.Choice(PROVIDERS), help="Show only rows of this execution provider.")
@click.option(
    "--filter",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Show only cells whose name matches PATTERN, such as `onnx-*`. Can be repeated.",
)
@click.option(
    "--sort",
    "order",
    type=click.Choice(["accuracy", "latency", "throughput", "memory", "size"]),
    help="Sort by this figure, the best row first.",
)
@gate_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "latex", "csv", "json", "html"]),
    default="table",
    show_default=True,
    help="Format of the output.",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the plots, as PNG and SVG files.",
)
@json_option
@results_option
@model_options
def compare(
    results: tuple[Path, ...],
    model: str,
    exported: Path,
    folder_name: str | None,
    baseline: str | None,
    provider: str | None,
    patterns: tuple[str, ...],
    order: str | None,
    max_drop: float | None,
    max_p95_ms: float | None,
    max_size_mb: float | None,
    max_memory_mb: float | None,
    against: Path | None,
    max_regression: float,
    form: str,
    plots: Path | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Compare result files in one table with a row for each cell; without RESULTS, show the model's newest run.

    With limits, the command names the fastest row that meets all limits, and the limits that other rows break. With
    --against OLD, the command names the figures that are worse than in OLD. Exit code 3: no row meets all limits, or a
    figure is worse than in OLD by more than allowed.

    \b
    Examples:
      toolchain compare
      toolchain compare laptop.json server.json --baseline onnx-fp32 --format markdown
      toolchain compare --max-drop 1.0 --max-p95-ms 5 --max-size-mb 30 --provider cpu
      toolchain compare new.json --against old.json --max-regression 5%
      toolchain compare --format html > report.html
      toolchain compare --format latex > table.tex
    """
    from toolchain.cli.progress import say
    from toolchain.compare.current import compare_current
    from toolchain.compare.limits import Limits, check_limits, require_winner
    from toolchain.compare.regressions import find_regressions, require_no_regressions
    from toolchain.compare.rows import arrange
    from toolchain.results.folder import ResultsFolder, read_old_run
    from toolchain.results.result_file import ResultFile

    if results:
        files = [ResultFile.read(path) for path in results]
    else:
        files = [ResultsFolder(folder).read_newest(open_workspace(model, exported, folder_name).model, say)]

    def load_rows(runs: Sequence[ResultFile]) -> list[Row]:
        return arrange(compare_current(runs, baseline, exported), order, patterns, provider)

    rows = load_rows(files)
    limits = Limits(max_drop, max_p95_ms, max_size_mb, max_memory_mb)
    verdict = check_limits(rows, limits) if limits != Limits() else None
    result = None
    if against:
        result = find_regressions(rows, load_rows([read_old_run(against, files)]), max_regression)
    if plots:
        from toolchain.compare.report.plots import save

        for path in save(rows, plots):
            say(f"saved: {path}")
    show(rows, "json" if as_json else form, verdict, result)
    if verdict:
        require_winner(verdict)
    if result:
        require_no_regressions(result)


def show(
    rows: Sequence[Row], form: str, verdict: Verdict | None = None, regressions: Regressions | None = None
) -> None:
    """Prints the rows in the given format, then the verdicts, for CSV, HTML and LaTeX on standard error."""
    from toolchain.compare.report import verdict as verdicts
    from toolchain.system.escaping import escape_line

    lines = [*(verdicts.choice_lines(verdict) if verdict else [])]
    lines += verdicts.regression_lines(regressions) if regressions else []
    if form == "json":
        body: Any = [row.to_json() for row in rows]
        if verdict or regressions:
            body = {"rows": body}
            body |= {"verdict": verdicts.choice_json(verdict)} if verdict else {}
            body |= {"regressions": verdicts.regression_json(regressions)} if regressions else {}
        echo_json(body, allow_nan=False)
        return
    if form == "csv":
        from toolchain.compare.report.flat import to_csv

        echo(to_csv(rows), nl=False)
    elif form == "html":
        from toolchain.compare.report.html import to_html

        echo(to_html(rows), nl=False)
    elif form == "markdown":
        from toolchain.compare.report.markdown import to_markdown

        echo(to_markdown(rows), nl=False)
    elif form == "latex":
        from toolchain.compare.report.latex import to_latex

        echo(to_latex(rows), nl=False)
    else:
        from toolchain.compare.report.table import print_table

        print_table(rows)
    for line in lines:
        echo(escape_line(line), err=form in ("csv", "html", "latex"))
