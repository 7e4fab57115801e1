"""Computes the logits of int8 variants on x86 without VNNI, where the sum of two U8 × S8 products saturates in 16 bits.

    python benchmarks/saturation.py

For graphs of standard operators, the script computes the exact and the saturated logits of the validation set. ONNX
Runtime computes the exact logits, so the script needs a processor that does not saturate. The reference evaluator of
the package onnx computes the saturated logits, with a MatMulInteger that saturates like the x86 instruction vpmaddubsw.
The script writes benchmarks/studies/saturation-reference.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from toolchain.backends import Place, open_session
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.passes import headroom, read
from toolchain.system import hardware

STUDY = Path(__file__).parent / "studies" / "saturation-reference.json"
VARIANTS = ("onnx-std-int8", "onnx-std-int8-portable")
LOW, HIGH = -32768, 32767


class MatMulInteger(OpRun):
    """A MatMulInteger that adds pairs of neighbouring products in 16 bits with saturation."""

    def _run(
        self, a: np.ndarray, b: np.ndarray, a_zero_point: np.ndarray, b_zero_point: np.ndarray
    ) -> tuple[np.ndarray]:
        if b_zero_point:
            raise click.ClickException("The zero point of the int8 weights is not 0.")
        rows, weights = a.reshape(-1, a.shape[-1]).astype(np.int32), b.astype(np.int32)
        total = np.zeros((len(rows), weights.shape[1]), np.int32)
        for k in range(0, rows.shape[1], 2):
            total += np.clip(rows[:, k : k + 2] @ weights[k : k + 2], LOW, HIGH)
        total -= int(a_zero_point) * weights.sum(axis=0, dtype=np.int32)
        return (total.reshape(*a.shape[:-1], -1),)


@click.command()
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
def main(exported: Path) -> None:
    """Builds the variants, computes their exact and saturated logits, saves the results and prints them."""
    workspace, data = Workspace.open("reference", exported), inputs.load_embedded()
    artifacts = ensure(workspace, VARIANTS, {}, say)
    rows = {}
    for name in VARIANTS:
        path, manifest = artifacts[name].path, artifacts[name].manifest
        encoder = Encoder.open(path, [spec.name for spec in manifest.inputs], manifest.max_length)
        batches = [pad([row], encoder.names, encoder.pad_id) for row in encoder.encode(data.texts)]
        session = open_session(path, "onnx", Place("cpu", hardware.cores()))
        exact = np.concatenate([session.run(batch) for batch in batches])
        evaluator = ReferenceEvaluator(onnx.load(path / "model.onnx"), new_ops=[MatMulInteger])
        saturated = []
        with bar(name) as progress:
            for done, batch in enumerate(batches):
                progress(done, len(batches), "sentences")
                saturated.append(evaluator.run(None, batch)[0])
        deltas = np.abs(np.concatenate(saturated) - exact).max(axis=1)
        predictions = [logits.argmax(axis=1) for logits in (exact, np.concatenate(saturated))]
        rows[name] = {
            "headroom": headroom(read(path / "model.onnx")),
            "largest_delta": round(float(deltas.max()), 4),
            "median_delta": float(f"{np.median(deltas):.2g}"),
            "flips": int((predictions[0] != predictions[1]).sum()),
            "correct": [int((labels == np.array(data.labels)).sum()) for labels in predictions],
            "count": len(data.labels),
        }
    body = {"schema": 1, "machine": hardware.machine(), "rows": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this script as the lines of a text table."""
    lines = [
        f"{'':24} {'int8 headroom':>13} {'median |Δlogit|':>16} {'largest |Δlogit|':>17} {'flips':>6}   "
        "accuracy without / with saturation"
    ]
    for name, row in body["rows"].items():
        exact, saturated = (f"{correct / row['count']:.2%}" for correct in row["correct"])
        figures = f"{row['headroom']:13.3f} {row['median_delta']:16.2g} {row['largest_delta']:17.2g} {row['flips']:6}"
        lines.append(f"{name:24} {figures}   {exact} / {saturated}")
    return lines


if __name__ == "__main__":
    main()
