"""Measures the latency of variants and of optimum-cli's int8 model in a browser, interleaved in one run.

    make test-clients
    make install SET=optimum VENV=.venv-optimum
    .venv-optimum/bin/python benchmarks/browser.py --variant VARIANT ...

The script ships each variant in a web bundle of its own. Optimum's model gets the bundle of `onnx-int8`, with only the
ONNX file replaced. In every round, each model starts in a new Chromium, in random order, with one WebAssembly thread.
transformers.js classifies the validation sentences one at a time, and the measured time includes tokenising. The script
writes benchmarks/studies/browser-reference.json and prints the speed-ups over Optimum's model.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from clients import CACHE, ROOT, SEED, STUDY, run_page
from engines.table import ENGINES, share_engines
from peers import PARENTS, write_sources

from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.progress import no_bar
from toolchain.results import statistics
from toolchain.results.measurements import Samples
from toolchain.ship import shipping
from toolchain.ship.shipping import Order
from toolchain.ship.targets import clients
from toolchain.system import hardware

OPTIMUM = "optimum-cli-int8"
SCHEME, DTYPE = "onnx/model_quantized.onnx", "q8"  # the ONNX file of an int8 bundle, and its name in transformers.js


def ship_bundles(workspace: Workspace, names: Sequence[str], scratch: Path) -> dict[str, Path]:
    """Ships a web bundle for each variant and one for Optimum's model; returns the folder of each."""
    artifacts = ensure(workspace, PARENTS, {}, say)
    root, std = (artifacts[name] for name in PARENTS)
    engine = ENGINES["optimum-cli"]
    share_engines()
    sources = write_sources(root, std, scratch)
    optimum = engine.build(engine.python(scratch), sources, scratch)[OPTIMUM]
    folders = {name: scratch / name for name in ("onnx-int8", *names)}
    for name, folder in folders.items():
        shipping.ship(workspace, Order((name,), "web"), folder, say, no_bar)
    folders[OPTIMUM] = shutil.copytree(folders["onnx-int8"], scratch / "optimum-bundle")
    model_file = next(folders[OPTIMUM].rglob(SCHEME))
    shutil.copyfile(optimum / "model.onnx", model_file)
    return folders


def measure(folders: dict[str, Path], texts: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs each bundle once in every round, in random order; returns the results of `page.js` of each bundle."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    order = [name for turn in range(rounds) for name in random.Random(SEED + turn).sample(list(folders), len(folders))]
    with bar("browser") as progress:
        for done, name in enumerate(order):
            progress(done, len(order), name)
            results[name].append(run_page(folders[name], DTYPE, json.dumps(texts)))
    return results


def rows_of(results: dict[str, list[dict[str, Any]]], labels: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of each model: accuracy, latency, and speed-up over Optimum's model."""
    samples = {
        name: Samples.from_single([[round(1000 * ms) for ms in each["ms"]] for each in rounds])
        for name, rounds in results.items()
    }
    rows = {}
    for name, rounds in results.items():
        speedup = statistics.ratio(samples[OPTIMUM].sentence_times(), samples[name].sentence_times())
        right = sum(a == b for a, b in zip(rounds[0]["answers"], labels, strict=True))
        rows[name] = {
            "accuracy": round(right / len(labels), 4),
            "latency_ms": samples[name].milliseconds(),
            "speedup": round(speedup.value, 3),
            "speedup_interval": [round(speedup.low, 3), round(speedup.high, 3)],
            "first_answer_ms": sorted(round(each["first_ms"], 1) for each in rounds),
        }
    return rows


@click.command()
@click.option("--variant", "variants", multiple=True, help="Add this int8 variant to the measurement. Can be repeated.")
@click.option("--rounds", type=click.IntRange(statistics.FEWEST_ROUNDS), default=6, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=ROOT / "exported", show_default=True)
def main(variants: tuple[str, ...], rounds: int, exported: Path) -> None:
    """Ships the bundles, measures every model in Chromium, saves the results and prints them."""
    if clients.find_modules(CACHE) is None:
        raise click.ClickException("Run `make test-clients` first.")
    workspace = Workspace.open("reference", exported)
    data = inputs.load_embedded()
    with tempfile.TemporaryDirectory() as scratch:
        folders = ship_bundles(workspace, variants, Path(scratch))
        results = measure(folders, list(data.texts), rounds)
    labels = [data.label_set.names[int(label)] for label in data.labels]
    rows = rows_of(results, labels)
    packages = {name: clients.version(name) for name in (clients.TRANSFORMERS, clients.RUNTIME)}
    body = {"schema": 1, "machine": hardware.machine(), "packages": packages, "rounds": rounds, "rows": rows}
    STUDY.with_name("browser-reference.json").write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table, the fastest model first."""
    rows = sorted(body["rows"].items(), key=lambda item: -item[1]["speedup"])
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}} {'accuracy':>9} {'mean ms':>8} {'speed-up':>9}"]
    for name, row in rows:
        low, high = row["speedup_interval"]
        times = f"{row['latency_ms']['mean']:8.2f} {row['speedup']:8.2f}× [{low:.2f}, {high:.2f}]"
        lines.append(f"{name:{width}} {row['accuracy']:9.2%} {times}")
    return lines


if __name__ == "__main__":
    main()
