"""Plan: the machines that a goal needs, computed from measured samples."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.completion import complete_files, complete_variants_in_result
from toolchain.cli.options import Duration, debug_option, json_option, require_finite
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.capacity.replicas import QueryGoal
    from toolchain.results.measurements import Measurement
    from toolchain.results.result_file import ResultFile


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option(
    "--rows",
    type=click.FloatRange(1, 1e15),
    callback=require_finite,
    metavar="NUMBER",
    help="Plan for this number of rows, such as 1e9; needs --within.",
)
@click.option("--within", type=Duration(), help="Time for all rows, such as 90m, 6h or 2d.")
@click.option(
    "--qps",
    type=click.FloatRange(0.001, 1e7),
    callback=require_finite,
    metavar="NUMBER",
    help="Plan for this mean number of queries per second; needs --p99-ms.",
)
@click.option(
    "--p99-ms",
    type=click.FloatRange(0, 1e7, min_open=True),
    callback=require_finite,
    metavar="MS",
    help="Largest p99 of the latency in ms, waiting included.",
)
@click.option(
    "--trace",
    metavar="FILE",
    shell_complete=complete_files,
    help="Times of arrival in seconds: one per line, or a column of a CSV, TSV, JSON lines or Parquet file. With "
    "--qps, the trace is stretched to this rate.  [default: random arrivals]",
)
@click.option(
    "--trace-column",
    metavar="NAME",
    help="Column of the times in --trace.  [default: the only column, or arrival, arrival_s, time or timestamp]",
)
@click.option(
    "--price",
    type=click.FloatRange(0, 1e9),
    callback=require_finite,
    metavar="PER_CORE_HOUR",
    help="Price of a core for one hour, in any currency; of a GPU for variants on a GPU.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="VARIANT",
    shell_complete=complete_variants_in_result,
    help="Plan only for this variant or cell. Can be repeated.",
)
@json_option
@debug_option
def plan(
    result: Path,
    rows: float | None,
    within: float | None,
    qps: float | None,
    p99_ms: float | None,
    trace: str | None,
    trace_column: str | None,
    price: float | None,
    variants: tuple[str, ...],
    as_json: bool,
) -> None:
    """Plan cores and machines from the raw samples in RESULT, a result file of `toolchain bench`.

    With --rows, the command plans a job: cores, machines, hours and cost. With --qps, it plans a service: it simulates
    the queues of the replicas, and finds the fewest replicas that keep the p99, their largest batch, and the window in
    which a replica waits for a full batch. Below the table, it states its assumptions. Exit code 3: no variant can
    reach the goal.

    \b
    Examples:
      toolchain plan result.json --rows 1e9 --within 6h --price 0.04
      toolchain plan result.json --qps 2000 --p99-ms 50 --variant onnx-int8
      toolchain plan result.json --trace arrivals.csv --p99-ms 50
    """
    from toolchain.capacity.outcome import choose_rows
    from toolchain.results.providers import is_on_gpu
    from toolchain.results.result_file import ResultFile

    _check_usage(rows, within, qps, p99_ms, trace, trace_column)
    measured = ResultFile.read(result)
    cells = choose_rows(measured, variants)
    if price is not None and len({is_on_gpu(row.provider) for row in cells}) == 2:
        raise click.UsageError(
            "--price is the price of a core or of a GPU, but the result file has rows for both. Choose cells with "
            f"--variant, such as --variant {cells[0].cell}."
        )
    if rows is not None and within is not None:
        _plan_rows(measured, cells, rows, within, price, as_json)
    elif p99_ms is not None:
        _plan_queries(measured, cells, _goal(qps, p99_ms, trace, trace_column, price), trace or "", as_json)


def _check_usage(
    rows: float | None,
    within: float | None,
    qps: float | None,
    p99_ms: float | None,
    trace: str | None,
    trace_column: str | None,
) -> None:
    """Raises `UsageError` unless the options state exactly one goal."""
    has_queries = qps is not None or trace is not None
    if rows is None and not has_queries:
        raise click.UsageError("Give a goal: --rows with --within, or --qps with --p99-ms.")
    if rows is not None and has_queries:
        raise click.UsageError("--rows excludes --qps and --trace.")
    if (rows is None) != (within is None):
        raise click.UsageError("--rows and --within need each other.")
    if has_queries != (p99_ms is not None):
        raise click.UsageError("--p99-ms and --qps (or --trace) need each other.")
    if trace_column is not None and trace is None:
        raise click.UsageError("--trace-column needs --trace.")


def _goal(qps: float | None, p99_ms: float, trace: str | None, column: str | None, price: float | None) -> QueryGoal:
    from toolchain.capacity.load import Load
    from toolchain.capacity.replicas import QueryGoal
    from toolchain.capacity.trace import read_trace

    load = Load(qps or 0.0) if trace is None else Load.of_trace(read_trace(trace, column), qps)
    return QueryGoal(load, p99_ms / 1000, price)


def _plan_rows(
    result: ResultFile, cells: Sequence[Measurement], rows: float, within_s: float, price: float | None, as_json: bool
) -> None:
    from toolchain.capacity import rows as planning
    from toolchain.capacity import text
    from toolchain.capacity.outcome import plan_all

    goal = planning.RowsGoal(rows, within_s, price)
    outcome = plan_all(result, cells, lambda row, machines: planning.plan_rows(row, machines, goal))
    _print(text.rows_json(result, goal, outcome) if as_json else text.rows_lines(result, goal, outcome, _width()))
    outcome.require_plan()


def _plan_queries(result: ResultFile, cells: Sequence[Measurement], goal: QueryGoal, trace: str, as_json: bool) -> None:
    from toolchain.capacity import text
    from toolchain.capacity.machines import Machines
    from toolchain.capacity.outcome import plan_all
    from toolchain.capacity.replicas import ReplicaPlan, plan_replicas
    from toolchain.cli.progress import bar

    with bar("plan") as progress:

        def plan_row(row: Measurement, machines: Machines) -> ReplicaPlan:
            done = cells.index(row)
            return plan_replicas(
                row, machines, goal, lambda activity: progress(done, len(cells), f"{row.cell}, {activity}")
            )

        outcome = plan_all(result, cells, plan_row)
    _print(
        text.replica_json(result, goal, trace, outcome)
        if as_json
        else text.replica_lines(result, goal, trace, outcome, _width())
    )
    outcome.require_plan()


def _width() -> int | None:
    """Returns the number of characters in a line of the terminal; None if the output is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print(page: dict[str, Any] | list[str]) -> None:
    """Prints a JSON object, or lines of text."""
    from toolchain.system.escaping import escape_line

    if isinstance(page, dict):
        echo_json(page)
        return
    for line in page:
        echo(escape_line(line))
