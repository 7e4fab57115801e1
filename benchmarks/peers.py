"""`onnx-int8` against optimum-cli's own int8 of the same checkpoint, interleaved in one run.

    python benchmarks/peers.py [--model reference] [--exported exported] [--save-as NAME]

Builds the peer with `optimum-cli export onnx` and `optimum-cli onnxruntime quantize --avx512_vnni` in a scratch folder,
measures it between this toolchain's variants under the same clock, and prints for each cell the ratio to the peer with
its 95 % bootstrap interval over rounds. The result file goes to benchmarks/studies/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from toolchain import artifacts, confidence, hardware, inputs
from toolchain.artifacts import Artifact
from toolchain.cells import Cell
from toolchain.measurements import Measurement, ResultFile, Samples
from toolchain.pipeline import Workspace, ensure
from toolchain.report.progress import bar, say
from toolchain.report.table import print_table
from toolchain.runs import result_of
from toolchain.scenarios import FULL
from toolchain.steps.bench import bench
from toolchain.steps.compare import compare

OURS = ("torch-fp32", "onnx-fp32", "onnx-int8")
PEER = "optimum-cli-int8"
STUDIES = Path(__file__).parent / "studies"


def build_peer(parent: Artifact, scratch: Path) -> Artifact:
    """optimum-cli's int8 of the checkpoint in `parent`, as an artifact the benchmark can open."""
    cli = Path(sys.executable).with_name("optimum-cli")
    exported, quantized = scratch / "exported", scratch / "quantized"
    for command in (
        [cli, "export", "onnx", "--model", parent.path, "--task", "text-classification", exported],
        [cli, "onnxruntime", "quantize", "--onnx_model", exported, "--avx512_vnni", "-o", quantized],
    ):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (quantized / "model_quantized.onnx").rename(quantized / "model.onnx")
    manifest = replace(
        parent.manifest, variant=PEER, files=artifacts.list_files(quantized), facts={"made_by": "optimum-cli"}
    )
    return Artifact(quantized, manifest)


def ratio(ours: Samples, peer: Samples) -> str:
    """Peer's time / ours, round by round, with its 95 % interval; above 1, ours is faster."""
    found = confidence.ratio(peer.spent_each(), ours.spent_each())
    return f"{found.value:.2f}× [{found.low:.2f}, {found.high:.2f}]"


def measured(row: Measurement) -> tuple[Samples, Samples]:
    """Both samples of a row that was measured."""
    if row.latency is None or row.batches is None:
        raise click.ClickException(f"{row.cell}: {row.reason} {row.mend}")
    return row.latency, row.batches


def summary(result: ResultFile) -> list[str]:
    """A line for each of our variants: how many times the peer's speed, and both accuracies."""
    peer = next(row for row in result.rows if row.variant == PEER)
    size = result.run["batch_size"]
    lines = []
    for row in result.rows:
        if row is not peer and row.accuracy and peer.accuracy:
            single, batched = (ratio(ours, theirs) for ours, theirs in zip(measured(row), measured(peer), strict=True))
            accuracy = f"accuracy {row.accuracy.value:.2%} against {peer.accuracy.value:.2%}"
            lines.append(f"{row.cell:15} batch 1: {single}   batches of {size}: {batched}   {accuracy}")
    return lines


@click.command()
@click.option("--model", default="reference", show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--save-as", default="peers-reference", show_default=True)
def main(model: str, exported: Path, save_as: str) -> None:
    """Builds, measures, prints, saves."""
    workspace = Workspace.open(model, exported)
    built = ensure(workspace, OURS, {}, say)
    root = built["torch-fp32"]
    encoder = inputs.Encoder.open(root.path, [s.name for s in root.manifest.inputs], root.manifest.max_length)
    data = inputs.load(None, root.manifest.labels)
    with tempfile.TemporaryDirectory() as scratch, bar("peers") as progress:
        found = {**{name: built[name] for name in OURS}, PEER: build_peer(root, Path(scratch))}
        cells = [
            Cell(workspace.model, name, "torch" if name.startswith("torch") else "onnx", "cpu", artifact)
            for name, artifact in found.items()
        ]
        rows, how = bench(cells, data, encoder, replace(FULL, threads=hardware.cores()), progress)
    result = result_of(rows, how, data, root.manifest.max_length)
    result.write(STUDIES / f"{save_as}.json")
    print_table(compare([result], f"{PEER}@cpu"))
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
