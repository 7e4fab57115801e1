"""Measures where the time of single sentences goes: tokenising, the graph, and each kind of operator of the graph.

    python benchmarks/operators.py [--exported exported] [--variant NAME ...]

The script runs the ONNX variants on one thread, one validation sentence at a time, in rounds with a random order of the
variants; see `toolchain.bench.operators`. It writes benchmarks/studies/operators-reference.json.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolchain.bench.operators import OperatorProfiler, Profile, largest_shares, median_profile
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
    """Measures the parts of each variant's time, saves the study and prints it."""
    names = (*DEFAULTS, *variants)
    artifacts = ensure(Workspace.open("reference", exported), names, {}, say)
    texts = list(inputs.load_embedded().texts)
    results: dict[str, list[Profile]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch, bar("operators") as progress:
        profilers = {name: OperatorProfiler(artifacts[name], Path(scratch)) for name in names}
        for turn in range(rounds):
            progress(turn, rounds, "rounds")
            for name in random.Random(SEED + turn).sample(names, len(names)):
                results[name].append(profilers[name].measure(texts))
    rows = {name: asdict(median_profile(each)) for name, each in results.items()}
    body = {"schema": 1, "machine": hardware.machine(), "rounds": rounds, "texts": len(texts), "rows": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: Mapping[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table, the largest operators first."""
    lines = []
    for name, row in body["rows"].items():
        profile = Profile(**row)
        tokenizing, graph = round(profile.tokenizing_us), round(profile.graph_us)
        lines.append(f"{name}: {tokenizing} µs for tokenising, {graph} µs for the graph, of which")
        lines += [f"  {operator:24} {share:6.1%}" for operator, share in largest_shares(profile.shares)]
    return lines


if __name__ == "__main__":
    main()
