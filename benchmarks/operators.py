"""Measures where the time of single sentences goes: tokenising, each kind of operator, and the work around operators.

    python benchmarks/operators.py [--exported exported] [--variant NAME ...]

The script runs the ONNX variants on one thread, one validation sentence at a time. In each round, it measures all
variants in random order: first the time from text to label, then, with the profiler of ONNX Runtime, the time of each
operator. The work around operators is the time of `Session.run` minus the time of all operators, for example that of
`If` nodes. The script writes benchmarks/studies/operators-reference.json.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from toolchain.bench.operators import TOTAL, OperatorProfiler, largest_parts, median_parts
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.system import hardware

STUDY = Path(__file__).parent / "studies" / "operators-reference.json"
DEFAULTS = ("onnx-fp32", "onnx-int8", "onnx-int8-static")
SEED = 20


@click.command()
@click.option("--variant", "variants", multiple=True, help="Add this ONNX variant. Can be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
def main(variants: tuple[str, ...], rounds: int, exported: Path) -> None:
    """Measures the parts of each variant's time, saves the study and prints the largest parts."""
    names = (*DEFAULTS, *variants)
    artifacts = ensure(Workspace.open("reference", exported), names, {}, say)
    texts = list(inputs.load_embedded().texts)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch, bar("operators") as progress:
        profilers = {name: OperatorProfiler(artifacts[name], Path(scratch)) for name in names}
        for turn in range(rounds):
            progress(turn, rounds, "rounds")
            for name in random.Random(SEED + turn).sample(names, len(names)):
                results[name].append(profilers[name].measure(texts))
    rows = {name: median_parts(each) for name, each in results.items()}
    body = {"schema": 1, "machine": hardware.machine(), "rounds": rounds, "texts": len(texts), "microseconds": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: Mapping[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table, the largest parts of each variant first."""
    lines = []
    for name, row in body["microseconds"].items():
        lines.append(f"{name}: {row[TOTAL]:.0f} µs from text to label")
        lines += [f"  {part:24} {us / row[TOTAL]:6.1%}" for part, us in largest_parts(row)]
    return lines


if __name__ == "__main__":
    main()
