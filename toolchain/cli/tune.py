"""Tune: searches for the best artifact."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import DATA, json_option, model_options, open_workspace, results_option, training_options
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource

_UNITS = {"s": 1, "m": 60, "h": 3600}


class Duration(click.ParamType):
    """A duration such as ``90s``, ``20m`` or ``2h``; its value is in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a duration such as 90s, 20m or 2h.", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="POINTS",
    help="Largest allowed accuracy drop against onnx-fp32, on held-out rows of the training data.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput", "size"]),
    default="latency",
    show_default=True,
    help="Figure to improve: latency of one sentence, throughput of batches, or size in bytes.",
)
@click.option(
    "--budget",
    type=Duration(),
    default="20m",
    show_default=True,
    help="Time for the search. A trial that is running when the budget ends still finishes.",
)
@click.option("--data", metavar="DATA", help=f"Data for the final measurement: {DATA}.  [default: the embedded SST-2]")
@training_options
@json_option
@results_option
@model_options
def tune(
    model: str,
    exported: Path,
    folder_name: str | None,
    max_drop: float,
    objective: str,
    budget: float,
    data: str | None,
    train: TrainingSource,
    folder: Path,
    as_json: bool,
) -> None:
    """Search for the fastest or smallest ONNX artifact within the allowed accuracy drop; measures on this machine.

    The search varies the pruning (ratio, depth and measure of cost), the epochs of recovery, the number of bits (8 or
    4), and which layers stay in fp32. Each trial remains as a variant whose label starts with `tune`. If you interrupt
    the search, the same command continues it.
    The search measures accuracy on held-out rows of the training data. At the end, the command measures the Pareto
    front of the trials once on the validation set.

    \b
    Examples:
      toolchain tune
      toolchain tune --max-drop 2 --objective size --budget 1h
      toolchain tune --model ./my-checkpoint --train-data train.csv --data validation.csv
    """
    from toolchain.bench import run
    from toolchain.bench.scenarios import QUICK
    from toolchain.cli.progress import bar, say
    from toolchain.compare.report.table import print_table
    from toolchain.compare.rows import compare
    from toolchain.results.folder import ResultsFolder, require_measured
    from toolchain.system import hardware
    from toolchain.tuning import EXACT, Request, summary
    from toolchain.tuning import tune as search

    workspace = open_workspace(model, exported, folder_name, train)
    protocol = replace(QUICK, threads=hardware.cores())
    results = ResultsFolder(folder)
    final_request = run.Request((), ("cpu",), protocol, data, train.columns, results=results)
    run.evaluation_data(workspace, final_request, say)  # Unsuitable data must raise its error before the search.
    best, front = search(workspace, Request(objective, max_drop, budget), say, bar)
    names = dict.fromkeys(["torch-fp32", EXACT, best.baseline, *(outcome.variant for outcome in front)])
    with bar("Pareto front on the validation set") as progress:
        result, journal = run.measure(workspace, replace(final_request, names=tuple(names)), say, progress)
    path = results.save_local(result, workspace.model)
    journal.end()
    say(f"saved: {path}")
    if as_json:
        output = {"best": asdict(best), "front": [asdict(outcome) for outcome in front], "result": str(path)}
        echo_json(output)
    else:
        print_table(compare([result], f"{best.baseline}@cpu"))
        echo(f"\nbest on held-out rows: {summary(best)}")
        echo(workspace.path(best.variant))
    require_measured(result)
