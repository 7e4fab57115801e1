"""Tune: searches for the best artifact."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from toolchain.cli.completion import complete_files, complete_variants
from toolchain.cli.options import (
    DATA,
    Duration,
    json_option,
    model_options,
    open_workspace,
    results_option,
    training_options,
)
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.bench.run import Request as BenchRequest
    from toolchain.build.workspace import Workspace
    from toolchain.data.inputs import TrainingSource
    from toolchain.results.session_file import SessionFile


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
@click.option(
    "--data",
    metavar="DATA",
    shell_complete=complete_files,
    help=f"Data for the final measurement: {DATA}.  [default: the embedded SST-2]",
)
@click.option(
    "--session",
    "variant",
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="Search for the best settings of ONNX Runtime for this variant instead, on the sentences of --data.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --session: file of the settings, for `toolchain ship --session`.  [default: a new file in --results]",
)
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
    variant: str | None,
    output: Path | None,
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
    With --session, the command builds no candidates. It measures settings of ONNX Runtime for one variant: threads,
    spinning, execution mode, optimisations of the graph, memory arena, and the size and padding of batches. It writes
    the best settings for latency, throughput and memory to a file. Settings count as better than the default only if
    the interval of their ratio excludes 1.

    \b
    Examples:
      toolchain tune
      toolchain tune --max-drop 2 --objective size --budget 1h
      toolchain tune --session onnx-int8 --output session.json
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

    _require_one_search(variant, output)
    workspace = open_workspace(model, exported, folder_name, train)
    if variant:
        _tune_session(
            workspace, run.Request((variant,), ("cpu",), QUICK, data, train.columns), budget, output, folder, as_json
        )
        return
    protocol = replace(QUICK, threads=hardware.cores())
    results = ResultsFolder(folder)
    final_request = run.Request((), ("cpu",), protocol, data, train.columns, results=results)
    run.evaluation_data(workspace, final_request, say)  # Unsuitable data must raise its error before the search.
    found = search(workspace, Request(objective, max_drop, budget), say, bar)
    best, front = found.best, found.front
    names = dict.fromkeys(["torch-fp32", EXACT, best.baseline, *(outcome.variant for outcome in front)])
    with bar("Pareto front on the validation set") as progress:
        result, journal = run.measure(workspace, replace(final_request, names=tuple(names)), say, progress)
    path = results.save_local(result, workspace.model)
    journal.end()
    say(f"saved: {path}")
    if as_json:
        echo_json({**asdict(found), "result": str(path)})
    else:
        print_table(compare([result], f"{best.baseline}@cpu"))
        echo(f"\nbest on held-out rows: {summary(best)}")
        echo("time: " + ", ".join(f"{seconds / 60:.1f} min {activity}" for activity, seconds in found.spent_s.items()))
        echo(workspace.path(best.variant))
    require_measured(result)


def _require_one_search(variant: str | None, output: Path | None) -> None:
    """Raises `click.UsageError` if an option belongs to the other search than the requested one."""
    if variant is None:
        if output:
            raise click.UsageError("--output needs --session.")
        return
    context = click.get_current_context()
    for name in ("max_drop", "objective", "train_data", "split"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --session.")


def _tune_session(
    workspace: Workspace, request: BenchRequest, budget: float, output: Path | None, folder: Path, as_json: bool
) -> None:
    """Searches for the best settings of ONNX Runtime, writes the session file and prints the choices."""
    from toolchain.cli.progress import bar, say
    from toolchain.results.folder import ResultsFolder
    from toolchain.results.session_file import require_replaceable, save
    from toolchain.tuning.session_search import Plan, tune_session

    if output:
        require_replaceable(output)
    result = tune_session(workspace, request, Plan(budget), say, bar)
    path = output or ResultsFolder(folder).session_path(workspace.model, result.variant, result.created)
    path = save(result, path, replace=output is not None)
    say(f"saved: {path}")
    if as_json:
        echo_json({"path": str(path), **result.to_json()})
        return
    _print_choices(result)


def _print_choices(result: SessionFile) -> None:
    """Prints one line for each objective: the settings, and the ratio of the tried settings to the default."""
    echo(f"{result.variant} on {result.machine['cpu']}, {result.machine['cores']} cores; above 1× is better\n")
    echo(f"{'objective':<11} {'ratio':>6}  {'95 % interval':<14} settings")
    for objective, choice in result.choices.items():
        value = interval = "–"
        if choice.ratio:
            value = f"{choice.ratio.value:.2f}×"
        if choice.ratio and choice.ratio.low is not None and choice.ratio.high is not None:
            interval = f"{choice.ratio.low:.2f} to {choice.ratio.high:.2f}"
        settings = choice.settings.summary(choice.default)
        if choice.tried and choice.tried != choice.settings:
            settings += f" (not better: {choice.tried.summary(choice.default)})"
        echo(f"{objective:<11} {value:>6}  {interval:<14} {settings}")
