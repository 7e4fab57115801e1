"""Commands that measure: bench, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import dry_run_option, json_option, model_options, open_workspace

if TYPE_CHECKING:
    from toolchain.measurements import ResultFile


@click.command()
@click.option(
    "--provider", "providers", multiple=True, type=click.Choice(["cpu", "cuda"]), help="Only these; may repeat."
)
@click.option("--variant", "names", multiple=True, metavar="VARIANT", help="Only these; may repeat.")
@click.option("--quick", is_flag=True, help="About 20 s a cell instead of 60.")
@click.option(
    "--device-id", type=click.IntRange(0), default=0, show_default=True, help="Which GPU, as nvidia-smi counts."
)
@click.option(
    "--allow-fallback",
    is_flag=True,
    help="Measure ONNX variants on a provider that leaves part of them to the CPU; the rows say so.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of every cell.  [default: physical cores]")
@click.option("--data", metavar="FILE", help="CSV or TSV to evaluate on.  [default: the embedded SST-2]")
@click.option("--text-column", help="Its column of sentences.  [default: sentence or text]")
@click.option("--label-column", default="label", show_default=True, help="Its column of labels.")
@click.option("--save-as", metavar="NAME", help="Save under benchmarks/results/NAME.json, to be committed.")
@json_option
@dry_run_option
@model_options
def bench(
    model: str,
    exported: Path,
    slug: str | None,
    providers: tuple[str, ...],
    names: tuple[str, ...],
    quick: bool,
    device_id: int,
    allow_fallback: bool,
    threads: int | None,
    data: str | None,
    text_column: str | None,
    label_column: str,
    save_as: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure accuracy, latency, throughput, memory and size of every variant, and compare them.

    Each variant runs in a process of its own; rounds are interleaved in random order. What is missing is built first.
    What cannot run here is listed with the reason.

    \b
    Examples:
      toolchain bench --quick
      toolchain bench --provider cuda
      toolchain bench --provider cpu --variant onnx-int8 --variant torch-fp32
      toolchain bench --data reviews.csv --text-column review
    """
    from toolchain import hardware, runs
    from toolchain.report.progress import bar, say
    from toolchain.steps.bench import Protocol

    if save_as and Path(save_as).name != save_as:
        raise click.BadParameter("a name, not a path", param_hint="--save-as")
    length = Protocol.quick if quick else Protocol.full
    protocol = length(threads or hardware.cores(), device_id, allow_fallback)
    request = runs.Request(names, providers, protocol, data, text_column, label_column)
    workspace = open_workspace(model, exported, slug)
    if dry_run:
        for name, provider, what in runs.outlook(workspace, request):
            click.echo(f"{name}@{provider}: {what}")
        return
    with bar("bench") as progress:
        result = runs.measure(workspace, request, say, progress)
    measured = any(row.status == "ok" for row in result.rows)
    # A name is for results to be committed: a run that measured nothing does not take it.
    say(f"saved: {runs.save(result, workspace.model, save_as if measured else None)}")
    _show([result], None, "json" if as_json else "table", exported)
    runs.judge(result)


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--baseline", metavar="CELL", help="Compare with this variant or cell.  [default: torch-fp32@cpu]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="Output.",
)
@json_option
@model_options
def compare(
    results: tuple[Path, ...],
    model: str,
    exported: Path,
    slug: str | None,
    baseline: str | None,
    form: str,
    as_json: bool,
) -> None:
    """Show result files side by side, one row a cell; without RESULTS the model's newest run.

    \b
    Examples:
      toolchain compare
      toolchain compare laptop.json server.json --baseline onnx-fp32 --format markdown
    """
    from toolchain import runs
    from toolchain.measurements import ResultFile
    from toolchain.report.progress import say

    if results:
        files = [ResultFile.read(path) for path in results]
    else:
        files = [runs.newest(open_workspace(model, exported, slug).model, say)]
    _show(files, baseline, "json" if as_json else form, exported)


def _show(files: Sequence[ResultFile], baseline: str | None, form: str, exported: Path) -> None:
    from toolchain import runs
    from toolchain.report.markdown import to_markdown
    from toolchain.report.table import print_table
    from toolchain.steps.compare import compare as comparison

    current = runs.current_ids(exported, [row for file in files for row in file.rows])
    rows = comparison(files, baseline, current)
    if form == "json":
        click.echo(json.dumps([row.to_json() for row in rows], indent=1))
    elif form == "markdown":
        click.echo(to_markdown(rows), nl=False)
    else:
        print_table(rows)
