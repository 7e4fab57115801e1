"""The command that measures: bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.compare import rows_of, show
from toolchain.cli.options import (
    RAY,
    data_options,
    dry_run_option,
    engine_options,
    json_option,
    model_options,
    open_workspace,
)

if TYPE_CHECKING:
    from toolchain.measurements import ResultFile
    from toolchain.pipeline import Workspace
    from toolchain.runs import Request
    from toolchain.tables import Columns


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
@data_options
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Most sentences of a batch.")
@click.option("--by-length", is_flag=True, help="Latency at 16, 32, … 512 tokens as well.")
@click.option("--save-as", metavar="NAME", help="Save under benchmarks/results/NAME.json, to be committed.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run of the same command.")
@engine_options
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
    columns: Columns,
    split: str | None,
    batch_size: int,
    by_length: bool,
    save_as: str | None,
    resume: bool,
    engine: str,
    address: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure accuracy, latency, throughput, memory and size of every variant, and compare them.

    Each variant runs in processes of its own; rounds are interleaved in random order. What is missing is built first.
    What cannot run here is listed with the reason. With --engine ray, every kind of machine of a Ray cluster measures
    what it has the hardware for, and has a result file of its own.

    \b
    Examples:
      toolchain bench --quick
      toolchain bench --provider cuda
      toolchain bench --provider cpu --variant onnx-int8 --variant torch-fp32
      toolchain bench --data reviews.csv --text-column review
      toolchain bench --quick --engine ray --address auto
    """
    from toolchain import hardware, runs
    from toolchain.scenarios import FULL, QUICK

    if engine == RAY and (resume or dry_run):
        raise click.UsageError("--resume and --dry-run are for --engine local.")
    if save_as and Path(save_as).name != save_as:
        raise click.BadParameter("a name, not a path", param_hint="--save-as")
    protocol = replace(
        QUICK if quick else FULL,
        threads=threads or hardware.cores(),
        batch_size=batch_size,
        by_length=by_length,
        device_id=device_id,
        allow_fallback=allow_fallback,
    )
    request = runs.Request(names, providers, protocol, data, columns, split, resume)
    workspace = open_workspace(model, exported, slug)
    if dry_run:
        for name, provider, what in runs.outlook(workspace, request):
            click.echo(f"{name}@{provider}: {what}")
        return
    if engine == RAY:
        results = _bench_on_ray(workspace, request, threads, address, save_as)
    else:
        results = [_bench_here(workspace, request, save_as)]
    show(rows_of(results, None, exported), "json" if as_json else "table")
    runs.judge(*results)


def _bench_here(workspace: Workspace, request: Request, save_as: str | None) -> ResultFile:
    from toolchain import runs
    from toolchain.report.progress import bar, say

    with bar("bench") as progress:
        result, journal = runs.measure(workspace, request, say, progress)
    _save(workspace, result, save_as)
    journal.end()
    return result


def _bench_on_ray(
    workspace: Workspace, request: Request, threads: int | None, address: str | None, save_as: str | None
) -> list[ResultFile]:
    from toolchain.distributed import connected
    from toolchain.distributed.benching import measure
    from toolchain.report.progress import say

    results = []
    with connected(address, say) as cluster:
        for result in measure(cluster, workspace, request, threads, say):
            _save(workspace, result, save_as, of_many=True)
            results.append(result)
    return results


def _save(workspace: Workspace, result: ResultFile, save_as: str | None, of_many: bool = False) -> None:
    from toolchain import runs
    from toolchain.report.progress import say

    measured = any(row.status == "ok" for row in result.rows)
    # A name is for results to be committed: a run that measured nothing does not take it.
    say(f"saved: {runs.save(result, workspace.model, save_as if measured else None, of_many)}")
