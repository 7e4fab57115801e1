"""Measures the cost of the session option for exact 8-bit products on this processor.

    python benchmarks/precision.py [--save-as NAME]

The script opens each variant twice: with `session.x64quantprecision` = 1 and without it. Both sessions of a
variant run alternately on one thread, with the same sentences, one by one and in batches of 32. The script
writes benchmarks/studies/NAME.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import onnxruntime as ort
from repeatability import write

from toolchain.backends.ort import EXACT_PRODUCTS, saturates, session_options
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.results import statistics

VARIANTS = ("onnx-int8", "onnx-int8-static", "onnx-std-int8")
ROUNDS = 30
SENTENCES = 64


@click.command()
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--save-as", default="precision-reference", show_default=True)
def main(exported: Path, save_as: str) -> None:
    """Builds the variants, measures them, saves the results and prints them."""
    artifacts = ensure(Workspace.open("reference", exported), VARIANTS, {}, say)
    texts = [str(text) for text in inputs.load_embedded().sample(SENTENCES, 1)]
    rows = {}
    for name in VARIANTS:
        manifest = artifacts[name].manifest
        encoder = Encoder.open(artifacts[name].path, [spec.name for spec in manifest.inputs], manifest.max_length)
        ids = sorted(encoder.encode(texts), key=len)
        batches = {
            "batch 1": [pad([row], encoder.names, encoder.pad_id) for row in ids],
            "batches of 32": [
                pad(ids[start : start + 32], encoder.names, encoder.pad_id) for start in range(0, len(ids), 32)
            ],
        }
        with bar(name) as progress:
            rows[name] = {
                kind: _time_ratio(artifacts[name].onnx_path, arrays, progress) for kind, arrays in batches.items()
            }
    body = {"option": EXACT_PRODUCTS, "saturates_without": saturates(), "rounds": ROUNDS, "rows": rows}
    write(save_as, body)
    for line in summary(body):
        click.echo(line)


def _time_ratio(file: Path, batches: list[Any], progress: Any) -> dict[str, float]:
    """Returns the time of a graph with `session.x64quantprecision` = 1, divided by the time without this option."""
    sessions = []
    for with_option in (True, False):
        options = session_options(1, exact=False)
        if with_option:
            options.add_session_config_entry(*EXACT_PRODUCTS)
        sessions.append(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        progress(turn, ROUNDS + 1, "rounds")
        for index in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            for batch in batches:
                sessions[index].run(None, batch)
            if turn:  # the first round is a warm-up
                times[index].append(time.perf_counter() - started)
    return statistics.ratio(*times).to_json()


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table."""
    state = "saturate" if body["saturates_without"] else "do not saturate"
    lines = [
        f"time ratio with / without {body['option'][0]} = {body['option'][1]}; "
        f"without it, 8-bit products on this processor {state}"
    ]
    for name, row in body["rows"].items():
        figures = (f"{kind}: {each['value']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" for kind, each in row.items())
        lines.append(f"{name:17} {'   '.join(figures)}")
    return lines


if __name__ == "__main__":
    main()
