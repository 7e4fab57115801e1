"""Measures the latency of bundles in Python, in Node and in a browser, and the sizes of their files.

    make test-clients
    python benchmarks/clients.py

The Python client runs in an environment with only onnxruntime, tokenizers and numpy. Each client classifies the same
validation sentences, one at a time; the measured time includes tokenising. The order of the clients is random in each
round. In every round, each client starts in a new process or in a new browser. The script writes
benchmarks/studies/clients-reference.json.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.progress import no_bar
from toolchain.results import statistics
from toolchain.results.measurements import Samples
from toolchain.ship import shipping
from toolchain.ship.bundle_files.serve import create_server
from toolchain.ship.shipping import Order
from toolchain.ship.targets import clients
from toolchain.system import hardware

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "studies" / "clients-reference.json"
CACHE = ROOT / "exported" / ".cache"
SCRIPTS = ROOT / "tests" / "clients"
PYTHON = CACHE / "test-clients" / "python" / "bin" / "python"
VARIANTS = {"onnx-int8": "q8", "onnx-fp32": "fp32"}
SEED = 20

sys.path.insert(0, str(ROOT / "tests"))
from chromium import Chromium  # noqa: E402 (the tests' driver)
from demo_page import serve  # noqa: E402


def run_process(*command: str | Path) -> dict[str, Any]:
    """Runs a client as a process and returns the JSON that it prints."""
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    output: dict[str, Any] = json.loads(process.stdout)
    return output


def run_page(folder: Path, dtype: str, texts: str, threads: int = 1) -> dict[str, Any]:
    """Serves a web bundle from this machine, runs page.js in a new browser and returns the result of page.js.

    With several threads, the bundle's own server sends the headers that the threads need.
    """
    server = serve_isolated(folder) if threads > 1 else serve(folder)
    with server as address, tempfile.TemporaryDirectory() as profile, Chromium(Path(profile)) as browser:
        browser.open(address)
        script = (SCRIPTS / "page.js").read_text()
        output: dict[str, Any] = browser.run(f"({script})('{dtype}', {texts}, {threads})")
    return output


@contextmanager
def serve_isolated(folder: Path) -> Iterator[str]:
    """Serves a web bundle with the server that each web bundle has, and yields its address."""
    with create_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def client_row(rounds: list[dict[str, Any]], python_labels: list[str]) -> dict[str, Any]:
    """Returns the figures of one client; a flip is a sentence whose label differs from the Python client's label."""
    samples = Samples.from_single([[round(1000 * ms) for ms in each["ms"]] for each in rounds])
    return {
        "latency_ms": samples.milliseconds(),
        "p50_interval_ms": statistics.median_interval(samples),
        "first_answer_ms": sorted(round(each["first_ms"], 1) for each in rounds),
        "sentences": len(python_labels),
        "flips": sum(a != b for a, b in zip(rounds[0]["answers"], python_labels, strict=True)),
    }


@click.command()
@click.option("--rounds", default=6, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=ROOT / "exported", show_default=True)
def main(rounds: int, exported: Path) -> None:
    """Ships the bundles, measures every client, saves the results and prints them."""
    modules = clients.find_modules(CACHE)
    if modules is None or not PYTHON.exists():
        raise click.ClickException("Run `make test-clients` first.")
    workspace = Workspace.open("reference", exported)
    texts = list(inputs.load_embedded().texts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "node_modules").symlink_to(modules)
        shutil.copy(SCRIPTS / "transformers.mjs", folder)
        (folder / "texts.json").write_text(json.dumps(texts))
        sizes = {}
        for target, names in (("web", tuple(VARIANTS)), ("python", tuple(VARIANTS)), ("other", ("onnx-std-int8",))):
            body = shipping.ship(workspace, Order(names, target), folder / target, say, no_bar)
            sizes[target] = {entry["path"]: entry["bytes"] for entry in body["files"]}
        commands: dict[str, Callable[[], dict[str, Any]]] = {}
        for variant, dtype in VARIANTS.items():
            commands[f"{variant}, Python"] = functools.partial(
                run_process, PYTHON, SCRIPTS / "bare.py", folder / "python", variant, folder / "texts.json"
            )
            commands[f"{variant}, Node"] = functools.partial(
                run_process, "node", folder / "transformers.mjs", folder / "web", dtype, folder / "texts.json"
            )
            commands[f"{variant}, browser"] = functools.partial(run_page, folder / "web", dtype, json.dumps(texts))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        order = [
            name for turn in range(rounds) for name in random.Random(SEED + turn).sample(list(commands), len(commands))
        ]
        with bar("clients") as progress:
            for done, name in enumerate(order):
                progress(done, len(order), name)
                results[name].append(commands[name]())
    python_labels = {variant: results[f"{variant}, Python"][0]["answers"] for variant in VARIANTS}
    rows = {name: client_row(each, python_labels[name.split(",")[0]]) for name, each in results.items()}
    packages = {name: clients.version(name) for name in (clients.TRANSFORMERS, clients.RUNTIME, "onnxruntime-node")}
    body = {"schema": 1, "machine": hardware.machine(), "packages": packages, "rounds": rounds, "rows": rows}
    STUDY.write_text(json.dumps({**body, "size_bytes": sizes}, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table."""
    lines = [f"{'':20} {'p50 ms':>8} {'p95 ms':>8} {'first answer ms':>16} {'flips':>6}"]
    for name, row in body["rows"].items():
        first = row["first_answer_ms"][len(row["first_answer_ms"]) // 2]
        p50, p95 = row["latency_ms"]["p50"], row["latency_ms"]["p95"]
        lines.append(f"{name:20} {p50:8.2f} {p95:8.2f} {first:16.0f} {row['flips']:6}")
    return lines


if __name__ == "__main__":
    main()
