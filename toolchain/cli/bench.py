"""Bench: measures every cell and prints the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.compare import show
from toolchain.cli.completion import complete_variants
from toolchain.cli.options import (
    RAY,
    data_options,
    dry_run_option,
    engine_options,
    json_option,
    model_options,
    open_workspace,
    results_option,
)
from toolchain.cli.output import echo
from toolchain.results.providers import PROVIDERS

if TYPE_CHECKING:
    from toolchain.bench.run import Request
    from toolchain.build.workspace import Workspace
    from toolchain.data.datasets import Columns
    from toolchain.results.result_file import ResultFile
    from toolchain.results.saving import Saver


@click.command()
@click.option(
    "--provider",
    "providers",
    multiple=True,
    type=click.Choice(PROVIDERS),
    help="Measure only on this execution provider; cuda includes cuda-graphs. Can be repeated.",
)
@click.option(
    "--variant",
    "names",
    multiple=True,
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="Measure only this variant. Can be repeated.",
)
@click.option("--quick", is_flag=True, help="Measure each cell (variant on a provider) for about 20 s instead of 60 s.")
@click.option(
    "--device-id", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU, as in nvidia-smi."
)
@click.option(
    "--allow-fallback",
    is_flag=True,
    help="Also measure ONNX variants with operators that the provider cannot run. The CPU runs these operators, and "
    "the comparison marks the rows of these variants.",
)
@click.option("--threads", type=click.IntRange(1), help="Number of CPU threads.  [default: physical cores]")
@data_options
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Largest number of sentences in a batch.",
)
@click.option("--by-length", is_flag=True, help="Also measure latency at 16, 32, … 512 tokens.")
@click.option(
    "--service-times",
    is_flag=True,
    help="Also measure the times that `toolchain plan --qps` needs: batches of 2, 4, 8, … random sentences, and single "
    "sentences after pauses.",
)
@click.option(
    "--scenario",
    type=click.Choice(["server"]),
    help="Also measure this scenario. server: sentences arrive at random times, and their waiting counts.",
)
@click.option(
    "--p99-ms",
    type=click.FloatRange(0, 1000, min_open=True),
    help="For --scenario server: search the highest rate with at most this p99 in ms.  [default: 50]",
)
@click.option(
    "--qps",
    type=click.FloatRange(0, 100_000, min_open=True),
    help="For --scenario server: measure all variants at this rate in sentences per second, without a search.",
)
@click.option("--save-as", metavar="NAME", help="Save the result as NAME.json in --results, so that you can commit it.")
@click.option("--force", is_flag=True, help="Let --save-as replace an existing file.")
@click.option("--resume", is_flag=True, help="Continue the interrupted run of the same command.")
@engine_options
@json_option
@dry_run_option
@results_option
@model_options
def bench(
    model: str,
    exported: Path,
    folder_name: str | None,
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
    service_times: bool,
    scenario: str | None,
    p99_ms: float | None,
    qps: float | None,
    save_as: str | None,
    force: bool,
    resume: bool,
    engine: str,
    address: str | None,
    folder: Path,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure accuracy, latency, throughput, memory and size of every variant, and compare them.

    The command builds missing variants first. Each variant runs in separate processes, and the rounds of all variants
    are interleaved in random order. A variant that cannot run on this machine is listed with the reason. With --engine
    ray, each kind of machine in a Ray cluster measures the variants that its hardware supports, and has its own result
    file.

    \b
    Examples:
      toolchain bench --quick
      toolchain bench --provider cuda
      toolchain bench --provider cpu --variant onnx-int8 --variant torch-fp32
      toolchain bench --scenario server --p99-ms 20
      toolchain bench --data reviews.csv --text-column review
      toolchain bench --quick --engine ray --address auto
    """
    from toolchain.bench import run
    from toolchain.bench.server import DEFAULT_P99_MS
    from toolchain.cli.progress import bar, say
    from toolchain.compare.current import compare_current
    from toolchain.results.folder import ResultsFolder, require_measured
    from toolchain.results.saving import Saver

    if engine == RAY and (resume or dry_run):
        raise click.UsageError("--resume and --dry-run need --engine local.")
    if save_as and Path(save_as).name != save_as:
        raise click.BadParameter("give a name, not a path", param_hint="--save-as")
    if force and not save_as:
        raise click.UsageError("--force needs --save-as.")
    if (p99_ms or qps) and not scenario:
        raise click.UsageError("--p99-ms and --qps need --scenario server.")
    if p99_ms and qps:
        raise click.UsageError("--p99-ms and --qps exclude each other.")
    protocol = run.make_protocol(
        quick,
        threads,
        batch_size=batch_size,
        by_length=by_length,
        service_times=service_times,
        server_p99_ms=(p99_ms or DEFAULT_P99_MS) if scenario and not qps else None,
        server_qps=qps,
        device_id=device_id,
        allow_fallback=allow_fallback,
    )
    results = ResultsFolder(folder)
    request = run.Request(names, providers, protocol, data, columns, split, resume, results)
    workspace = open_workspace(model, exported, folder_name)
    saver = Saver(results, workspace.model, save_as, force, say)
    if engine != RAY:
        saver.require_free([None])
    if dry_run:
        run.check_data(workspace, request, say)
        for name, provider, what in run.preview(workspace, request):
            echo(f"{name}@{provider}: {what}")
        return
    if engine == RAY:
        runs = _bench_on_ray(workspace, request, threads, address, saver)
    else:
        runs = [run.measure_and_save(workspace, request, saver, say, bar)[0]]
    show(compare_current(runs, None, exported), "json" if as_json else "table")
    require_measured(*runs)
    if saver.error:
        raise saver.error


def _bench_on_ray(
    workspace: Workspace, request: Request, threads: int | None, address: str | None, saver: Saver
) -> list[ResultFile]:
    from toolchain.cli.progress import say
    from toolchain.distributed import connect
    from toolchain.distributed.benching import measure

    results = []
    with connect(address, say) as cluster:
        saver.require_free([node.machine["id"] for node in cluster.nodes])
        for result in measure(cluster, workspace, request, threads, say):
            say(f"saved: {saver.save(result, result.machine['id'])}")
            results.append(result)
    return results
