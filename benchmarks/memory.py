"""Measures the memory of a process that answers texts of many lengths, with and without `release_memory`.

    python benchmarks/memory.py

Each row is a new process with one thread. It classifies the same 10,000 texts of 5 to 512 tokens, one by one or in
batches of 1 to 32 texts. The script writes memory-reference.json and memory-reference.svg to benchmarks/studies/.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import figures
import psutil

from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files.classify import Classifier
from toolchain.ship.shipping import Order
from toolchain.system import hardware

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "studies" / "memory-reference.json"
VARIANT = "onnx-int8"
SHORTEST, LONGEST = 5, 512  # number of tokens
BATCHES = {"one text": (1,), "1 to 32 texts": (1, 2, 4, 8, 16, 32)}
SEED = 7
POINTS = 100  # number of points of a curve


def measure(folder: str, sizes: list[int], release_memory: bool, count: int) -> dict[str, Any]:
    """Classifies texts in this process; returns resident memory in bytes beyond that of the loaded model, and seconds.

    A point of the curve is a number of texts, and the memory after them.

    Args:
        folder: Folder of a bundle.
        sizes: Sizes of batches; each batch has one of them by chance.
        release_memory: See `Classifier`.
        count: Number of texts.
    """
    classify, source, process = Classifier(folder, release_memory=release_memory), random.Random(SEED), psutil.Process()
    loaded = process.memory_info().rss
    done, largest, after, curve = 0, 0, {}, []
    started_s = time.process_time()
    while done < count:
        # The tokenizer gives "film" one token, and adds two tokens to each text.
        lengths = [source.randint(SHORTEST, LONGEST) for _ in range(source.choice(sizes))]
        classify([" ".join(["film"] * (length - 2)) for length in lengths])
        done += len(lengths)
        extra = process.memory_info().rss - loaded
        largest = max(largest, extra)
        after.update({mark: extra for mark in (100, 1000, count) if done >= mark and mark not in after})
        if done * POINTS >= count * (len(curve) + 1):
            curve.append((done, extra))
    return {
        "loaded_bytes": loaded,
        "largest_bytes": largest,
        "bytes_after": after,
        "curve": curve,
        "cpu_s": round(time.process_time() - started_s, 1),
    }


@click.command()
@click.option("--texts", default=10_000, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=ROOT / "exported", show_default=True)
def main(texts: int, exported: Path) -> None:
    """Ships a bundle, measures every row in a new process, saves the results and prints them."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        shipping.ship(Workspace.open("reference", exported), Order((VARIANT,), "python"), folder, say, no_bar)
        with bar("memory") as progress:
            for name, sizes in BATCHES.items():
                for release in (False, True):
                    progress(len(rows), 2 * len(BATCHES), f"{name}, release_memory={release}")
                    arguments = json.dumps([str(folder), sizes, release, texts])
                    run = subprocess.run(
                        [sys.executable, __file__],
                        input=arguments,
                        env={**os.environ, "TOOLCHAIN_THREADS": "1", "MEMORY_ROW": "1"},
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    rows.append({"batch": name, "release_memory": release, **json.loads(run.stdout)})
    body = {"schema": 1, "machine": hardware.machine(), "variant": VARIANT, "texts": texts, "rows": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    plot(body, STUDY.with_suffix(".svg"))
    for line in summary(body):
        click.echo(line)


def row_name(row: dict[str, Any]) -> str:
    """Returns the name of a row for readers."""
    return f"{row['batch']}{', memory released' if row['release_memory'] else ''}"


def plot(body: dict[str, Any], path: Path) -> None:
    """Plots the memory after each number of texts, with a line for each row."""
    with figures.axes(path, "number of classified texts", "memory beyond that of the loaded model, MB") as axes:
        for row, style in zip(body["rows"], ("C0--", "C0-", "C1--", "C1-"), strict=True):
            texts, extra = zip(*row["curve"], strict=True)
            axes.plot(texts, [each / 1e6 for each in extra], style, label=row_name(row))
        axes.set_ylim(bottom=0)
        axes.legend(loc="center right", frameon=False)


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table."""
    lines = [f"{'':30} {'largest MB':>10} {'after 100':>10} {'after 1,000':>12} {'at the end':>10} {'CPU time':>9}"]
    for row in body["rows"]:
        name = row_name(row)
        first, thousand, last = (row["bytes_after"][mark] / 1e6 for mark in ("100", "1000", str(body["texts"])))
        base = next(each["cpu_s"] for each in body["rows"] if each["batch"] == row["batch"])
        ratio = row["cpu_s"] / base
        lines.append(
            f"{name:30} {row['largest_bytes'] / 1e6:10.0f} {first:10.0f} {thousand:12.0f} {last:10.0f} {ratio:8.2f}×"
        )
    return lines


if __name__ == "__main__":
    if "MEMORY_ROW" in os.environ:
        print(json.dumps(measure(*json.load(sys.stdin))))
    else:
        main()
