"""Whether the benchmark tells equal from equal: pairs of one file, and two runs of the same cells.

    python benchmarks/repeatability.py pairs [--count 20]
    python benchmarks/repeatability.py runs ONE.json OTHER.json

`pairs` measures `onnx-int8` as twice `count` cells of one quick run and counts the pairs that are called different: the
interval of their ratio excludes 1. `runs` lays two result files side by side: how many of the ratios to the baseline
are within 5 %, or have intervals that overlap. Each writes what it found to benchmarks/studies/.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import QUICK
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.compare.rows import Row, compare
from toolchain.data import inputs
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, ResultFile
from toolchain.results.statistics import Ratio
from toolchain.system import hardware

STUDIES = Path(__file__).parent / "studies"
VARIANT = "onnx-int8"
WITHIN = 0.05


def write(name: str, body: dict[str, Any]) -> None:
    """One study, with the machine it was made on."""
    (STUDIES / f"{name}.json").write_text(
        json.dumps({"schema": 1, "machine": hardware.machine(), **body}, indent=1) + "\n"
    )


def of_pair(one: Measurement, other: Measurement) -> dict[str, Any]:
    """How the second compares with the first, in both scenarios."""
    if not (one.latency and other.latency and one.batches and other.batches):
        raise click.ClickException(f"{one.cell} or {other.cell} was not measured: {one.reason} {other.reason}")
    found = {
        "single-stream": statistics.ratio(one.latency.medians(), other.latency.medians()),
        "offline": statistics.ratio(one.batches.spent_each(), other.batches.spent_each()),
    }
    return {name: {**ratio.to_json(), "different": bool(ratio.differs)} for name, ratio in found.items()}


@click.group()
def main() -> None:
    """Whether the benchmark tells equal from equal."""


@main.command()
@click.option("--count", default=20, show_default=True)
@click.option("--save-as", default="pairs-reference", show_default=True)
def pairs(count: int, save_as: str) -> None:
    """Pairs of one file."""
    workspace = Workspace.open("reference", Path("exported"))
    built = ensure(workspace, [VARIANT], {}, say)
    root = built["torch-fp32"]
    encoder = inputs.Encoder.open(root.path, [s.name for s in root.manifest.inputs], root.manifest.max_length)
    data = inputs.load(None, root.label_set)
    cells = [Cell("reference", f"{VARIANT}#{i}", "onnx", "cpu", built[VARIANT]) for i in range(2 * count)]
    with bar("pairs") as progress:
        rows, how = bench(cells, data, encoder, replace(QUICK, threads=hardware.cores()), progress)
    found = [of_pair(one, other) for one, other in zip(rows[::2], rows[1::2], strict=True)]
    different = {name: sum(pair[name]["different"] for pair in found) for name in found[0]}
    write(save_as, {"variant": VARIANT, "run": how, "different": different, "pairs": found})
    click.echo(f"called different of {count} pairs of the same file: {different}")


def agree(one: Ratio, other: Ratio) -> bool:
    """Within 5 % of one another, or with intervals that overlap."""
    near = abs(one.value / other.value - 1) <= WITHIN
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return near
    return near or (one.low <= other.high and other.low <= one.high)


@main.command()
@click.argument("files", nargs=2, type=click.Path(path_type=Path))
@click.option("--save-as", default="runs-reference", show_default=True)
def runs(files: tuple[Path, Path], save_as: str) -> None:
    """Two runs of the same cells."""
    one, other = ({row.measurement.cell: row for row in compare([ResultFile.read(path)])} for path in files)
    found: list[dict[str, Any]] = []
    for cell, row in one.items():
        for name in ("speedup", "throughput_gain"):
            ratios = [getattr(r, name) for r in (row, other.get(cell)) if isinstance(r, Row)]
            if row.measurement is row.baseline or len(ratios) < 2 or None in ratios:
                continue
            found.append(
                {"cell": cell, "figure": name, "ratios": [r.to_json() for r in ratios], "agree": agree(*ratios)}
            )
    agreeing = sum(pair["agree"] for pair in found)
    write(save_as, {"agree": agreeing, "of": len(found), "ratios": found})
    click.echo(f"{agreeing} of {len(found)} ratios agree")


if __name__ == "__main__":
    main()
