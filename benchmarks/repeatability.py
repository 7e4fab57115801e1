"""Tests the benchmark itself: does it find differences between equal model files, and do two runs agree?

    python benchmarks/repeatability.py pairs [--count 20]
    python benchmarks/repeatability.py runs ONE.json OTHER.json

The command `pairs` measures `onnx-int8` in 2 × COUNT cells of one quick run. The benchmark calls two cells different if
the interval of their time ratio excludes 1; `pairs` counts the pairs of different cells. The command `runs` counts the
ratios to the baseline that agree in two result files. Two ratios agree if they are within 5 % of each other or their
intervals overlap. The commands `pairs` and `runs` write their results to benchmarks/studies/.
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
from toolchain.data import encoding, inputs
from toolchain.results import statistics
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile
from toolchain.results.statistics import Ratio
from toolchain.system import hardware

STUDIES = Path(__file__).parent / "studies"
VARIANT = "onnx-int8"
TOLERANCE = 0.05


def write(name: str, body: dict[str, Any]) -> None:
    """Writes results and a description of this machine to benchmarks/studies/."""
    (STUDIES / f"{name}.json").write_text(
        json.dumps({"schema": 1, "machine": hardware.machine(), **body}, indent=1) + "\n"
    )


def compare_pair(one: Measurement, other: Measurement) -> dict[str, Any]:
    """Returns the time ratio of two cells at batch 1 and in larger batches, and whether each ratio differs from 1."""
    if not (one.latency and other.latency and one.batches and other.batches):
        raise click.ClickException(f"{one.cell} or {other.cell} was not measured: {one.reason} {other.reason}")
    ratios = {
        "single-stream": statistics.ratio(one.latency.medians(), other.latency.medians()),
        "offline": statistics.ratio(one.batches.sentence_times(), other.batches.sentence_times()),
    }
    return {name: {**ratio.to_json(), "different": bool(ratio.differs)} for name, ratio in ratios.items()}


@click.group()
def main() -> None:
    """Tests the benchmark: equal model files must not have different times, and two runs must agree."""


@main.command()
@click.option("--count", default=20, show_default=True, help="Number of pairs.")
@click.option("--save-as", default="pairs-reference", show_default=True, help="Name of the study.")
def pairs(count: int, save_as: str) -> None:
    """Measures pairs of equal model files and counts the pairs whose times differ."""
    workspace = Workspace.open("reference", Path("exported"))
    artifacts = ensure(workspace, [VARIANT], {}, say)
    root = artifacts["torch-fp32"]
    encoder = encoding.Encoder.open(root.path, [s.name for s in root.manifest.inputs], root.manifest.max_length)
    data = inputs.load(None, root.label_set)
    cells = [Cell("reference", f"{VARIANT}#{i}", "onnx", "cpu", artifacts[VARIANT]) for i in range(2 * count)]
    with bar("pairs") as progress:
        rows, run_settings = bench(cells, data, encoder, replace(QUICK, threads=hardware.cores()), progress)
    entries = [compare_pair(one, other) for one, other in zip(rows[::2], rows[1::2], strict=True)]
    different = {name: sum(pair[name]["different"] for pair in entries) for name in entries[0]}
    write(save_as, {"variant": VARIANT, "run": run_settings, "different": different, "pairs": entries})
    click.echo(f"{count} pairs of equal model files; pairs that the benchmark calls different: {different}")


def agree(one: Ratio, other: Ratio) -> bool:
    """Returns whether two ratios are within 5 % of each other or have intervals that overlap."""
    is_close = abs(one.value / other.value - 1) <= TOLERANCE
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return is_close
    return is_close or (one.low <= other.high and other.low <= one.high)


@main.command()
@click.argument("files", nargs=2, type=click.Path(path_type=Path))
@click.option("--save-as", default="runs-reference", show_default=True)
def runs(files: tuple[Path, Path], save_as: str) -> None:
    """Compares how much faster each cell is than the baseline in two benchmark runs of the same cells."""
    one, other = ({row.measurement.cell: row for row in compare([ResultFile.read(path)])} for path in files)
    pairs: list[dict[str, Any]] = []
    for cell, row in one.items():
        for name in ("speedup", "throughput_gain"):
            ratios = [getattr(r, name) for r in (row, other.get(cell)) if isinstance(r, Row)]
            if row.measurement is row.baseline or len(ratios) < 2 or None in ratios:
                continue
            pairs.append(
                {"cell": cell, "figure": name, "ratios": [r.to_json() for r in ratios], "agree": agree(*ratios)}
            )
    count = sum(pair["agree"] for pair in pairs)
    write(save_as, {"agree": count, "of": len(pairs), "ratios": pairs})
    click.echo(f"{count} of {len(pairs)} ratios agree in the two runs")


if __name__ == "__main__":
    main()
