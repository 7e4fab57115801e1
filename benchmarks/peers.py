"""Measures `onnx-int8` and the models that other tools build from the same checkpoint, interleaved in one run.

    python benchmarks/peers.py [--shape reference|base] [--exported exported] [--variant NAME ...] [--full]
                               [--save-as NAME]

In this file, a peer is a model that a tool other than the toolchain builds or runs. The other tools write their models
to scratch folders.

* optimum-cli with `--avx512_vnni` builds two int8 models: one quantised per tensor, one per channel.
* Neural Compressor builds a dynamic and a static int8 model from the graph that optimum-cli exports.
* OpenVINO's runtime runs the toolchain's `onnx-std`, and the int8 model that NNCF builds from `onnx-std`.

The toolchain's ONNX Runtime runs the models of optimum-cli and Neural Compressor. One benchmark run measures the models
of all tools. For `onnx-int8`, `onnx-int8-static` and the variants of `--variant`, the script prints speed-ups over the
other tools' models, with 95 % bootstrap intervals over rounds. `--shape base` measures a model of DistilBERT-base's
shape with random weights, for speed only. The script writes the result file to benchmarks/studies/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import neural_compressor_peer
import openvino_peer

from toolchain.artifacts import store
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import is_variant
from toolchain.backends import BACKENDS, Backend
from toolchain.bench.cells import Cell
from toolchain.bench.run import make_result
from toolchain.bench.runner import Progress, bench
from toolchain.bench.scenarios import FULL, QUICK
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.compare.report.table import print_table
from toolchain.compare.rows import compare
from toolchain.data import encoding, inputs
from toolchain.models import checkpoints
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, Samples
from toolchain.results.result_file import ResultFile
from toolchain.system import hardware

OURS = ("torch-fp32", "torch-bf16", "torch-int8", "onnx-fp32", "onnx-int8", "onnx-int8-static")
PEER = "optimum-cli-int8"
# Variants named `torch-…` run on PyTorch, and those named `openvino-…` on OpenVINO; all others run on ONNX Runtime.
RUNTIMES = {"torch": "torch", "openvino": "openvino"}
STUDIES = Path(__file__).parent / "studies"
CALIBRATION = 300  # number of training sentences for calibration


def base_shape(folder: Path) -> Path:
    """Writes a checkpoint of DistilBERT-base's shape with random weights.

    A large bias makes one label far more probable, so that quantisation changes no prediction.
    """
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(1)
    model = DistilBertForSequenceClassification(DistilBertConfig())
    with torch.no_grad():
        model.classifier.bias[-1] += 30
    model.save_pretrained(folder)
    for name in checkpoints.TOKENIZER_FILES:
        if (checkpoints.REFERENCE / name).is_file():
            shutil.copyfile(checkpoints.REFERENCE / name, folder / name)
    return folder


def open_shape(shape: str, exported: Path, scratch: Path) -> Workspace:
    """Opens the reference model's workspace in `exported`, or that of a random DistilBERT-base model in `scratch`."""
    if shape == "reference":
        return Workspace.open(shape, exported)
    (scratch / "checkpoint").mkdir()
    return Workspace.open(str(base_shape(scratch / "checkpoint")), scratch / "artifacts", f"{shape}-shape")


def encoder_of(root: Artifact) -> encoding.Encoder:
    """Returns the `Encoder` that tokenises sentences for the model in `root`."""
    return encoding.Encoder.open(root.path, [spec.name for spec in root.manifest.inputs], root.manifest.max_length)


def measure_all(cells: Sequence[Cell], root: Artifact, full: bool, progress: Progress, **options: Any) -> ResultFile:
    """Measures all cells on the validation set, interleaved in one run; `options` are further arguments of `bench`."""
    data = inputs.load(None, root.label_set)
    protocol = replace(FULL if full else QUICK, threads=hardware.cores())
    rows, run_settings = bench(cells, data, encoder_of(root), protocol, progress, **options)
    return make_result(rows, run_settings, data, root.manifest.max_length)


def build_with_optimum(parent: Artifact, scratch: Path) -> dict[str, Artifact]:
    """Returns int8 models that optimum-cli builds from the checkpoint in `parent`, as artifacts for the benchmark.

    optimum-cli first exports an fp32 graph, which stays in ``scratch/exported``.
    """
    cli = Path(sys.executable).with_name("optimum-cli")
    exported = scratch / "exported"
    _run(cli, "export", "onnx", "--model", parent.path, "--task", "text-classification", exported)
    artifacts = {}
    for name, options in ((PEER, []), (f"{PEER}-per-channel", ["--per_channel"])):
        quantized = scratch / name
        _run(cli, "onnxruntime", "quantize", "--onnx_model", exported, "--avx512_vnni", *options, "-o", quantized)
        (quantized / "model_quantized.onnx").rename(quantized / "model.onnx")
        artifacts[name] = make_artifact(parent, name, quantized, "optimum-cli")
    return artifacts


def build_with_neural_compressor(std: Artifact, scratch: Path, tokens: Path) -> dict[str, Artifact]:
    """Returns int8 models by Neural Compressor; builds them from the graph that `build_with_optimum` exported.

    Args:
        std: Artifact whose config and tokenizer are copied beside each int8 model.
        scratch: Scratch folder.
        tokens: File with the tokens of the calibration sentences.
    """
    python = environment(scratch / "neural-compressor", neural_compressor_peer.PACKAGES)
    artifacts = {}
    for approach in ("dynamic", "static"):
        folder = scratch / f"neural-compressor-{approach}"
        folder.mkdir()
        script = (neural_compressor_peer.__file__, scratch / "exported" / "model.onnx", tokens)
        # Neural Compressor writes a log to its working folder, so it runs in the scratch folder.
        _run(python, *script, folder / "model.onnx", approach, folder=scratch)
        store.copy_companions(std, folder)
        artifacts[folder.name] = make_artifact(std, folder.name, folder, "Neural Compressor")
    return artifacts


def build_with_openvino(std: Artifact, scratch: Path, tokens: Path) -> dict[str, Artifact]:
    """Returns two OpenVINO models: the exported fp32 graph, and the same graph quantised to int8 by NNCF.

    Args:
        std: Artifact with the exported graph.
        scratch: Scratch folder.
        tokens: File with the tokens of the calibration sentences.
    """
    python = environment(scratch / "openvino", openvino_peer.PACKAGES)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    os.environ[openvino_peer.SITE] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    plain, quantized = scratch / "openvino-fp32", scratch / "openvino-int8"
    for folder in (plain, quantized):
        folder.mkdir()
        store.copy_companions(std, folder)
    shutil.copyfile(std.onnx_path, plain / "model.onnx")
    _run(python, openvino_peer.__file__, std.onnx_path, tokens, quantized / "model.xml")
    return {folder.name: make_artifact(std, folder.name, folder, "OpenVINO") for folder in (plain, quantized)}


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """Creates a Python environment with `packages` and returns the path of its interpreter."""
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
    return python


def _run(*command: str | Path, folder: Path | None = None) -> None:
    process = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        raise click.ClickException(
            f"{' '.join(map(str, command))} ended with exit code {process.returncode}:\n{process.stderr[-2000:]}"
        )


def make_artifact(parent: Artifact, name: str, folder: Path, maker: str) -> Artifact:
    """Returns an artifact for the model in `folder`, so that the benchmark can open this model."""
    files = store.list_files(folder)
    return Artifact(folder, replace(parent.manifest, variant=name, files=files, facts={"made_by": maker}))


def ratio(ours: Samples, peer: Samples) -> str:
    """Returns the time ratio `peer` / `ours` with its 95 % interval over rounds; above 1, `ours` is faster."""
    speedup = statistics.ratio(peer.sentence_times(), ours.sentence_times())
    return f"{speedup.value:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"


def require_samples(row: Measurement) -> tuple[Samples, Samples]:
    """Returns the time samples of a measured cell at batch 1 and in larger batches.

    Raises:
        ClickException: If the measurement `row` has no times at batch 1, or no times in larger batches.
    """
    if row.latency is None or row.batches is None:
        raise click.ClickException(f"{row.cell}: {row.reason} {row.mend}")
    return row.latency, row.batches


def summary(result: ResultFile) -> list[str]:
    """Returns lines that compare each quantised ONNX variant of the toolchain with the other cells of the run."""
    names = [row.variant for row in result.rows if is_variant(row.variant)]
    ours = [name for name in names if _is_quantised(name)]
    return [line for name in ours for line in comparison_lines(result, name)]


def _is_quantised(name: str) -> bool:
    parts = VariantName(name).parts
    return parts.runtime == "onnx" and parts.scheme != "fp32"


def comparison_lines(result: ResultFile, name: str) -> list[str]:
    """Returns lines that compare the variant `name` with other cells: speed-up, both accuracies, and McNemar's p."""
    ours = next(row for row in result.rows if row.variant == name)
    size, labels = result.run["batch_size"], result.data.get("labels")
    lines = [name]
    for row in result.rows:
        is_own_extra = is_variant(row.variant) and _is_quantised(row.variant) and row.variant not in OURS
        if row is ours or is_own_extra or not (row.score and ours.score):
            continue
        latency, throughput = (
            ratio(own, other) for own, other in zip(require_samples(ours), require_samples(row), strict=True)
        )
        accuracy = f"accuracy {ours.score.value:.2%} against {row.score.value:.2%}"
        if labels and row.predictions:
            answers = list(zip(ours.predictions, row.predictions, labels, strict=True))
            losses = sum(own != label == other for own, other, label in answers)
            wins = sum(own == label != other for own, other, label in answers)
            accuracy += f" (p = {statistics.mcnemar(losses, wins):.2f})"
        lines.append(f"  over {row.variant:28} batch 1: {latency}   batches of {size}: {throughput}   {accuracy}")
    return lines


@click.command()
@click.option("--shape", type=click.Choice(["reference", "base"]), default="reference", show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--variant", "variants", multiple=True, help="Add this variant to the measurement. Can be repeated.")
@click.option("--full", is_flag=True, help="Measure each cell for about 60 s instead of 20 s.")
@click.option("--save-as", help="[default: peers-SHAPE]")
def main(shape: str, exported: Path, variants: tuple[str, ...], full: bool, save_as: str | None) -> None:
    """Builds the other tools' models, measures all cells, saves the result file and prints the speed-ups."""
    with tempfile.TemporaryDirectory() as folder, bar("peers") as progress:
        scratch = Path(folder)
        workspace = open_shape(shape, exported, scratch)
        names = (*OURS, *variants)
        artifacts = ensure(workspace, names, {}, say)
        root, std = artifacts["torch-fp32"], artifacts["onnx-std"]
        train = inputs.load_embedded("train")
        row_indices = inputs.sentence_rows(train, inputs.hold_out(train)[0], CALIBRATION)
        tokens = scratch / "tokens.json"
        tokens.write_text(json.dumps(encoder_of(root).encode([train.texts[row] for row in row_indices])))
        peers = (
            build_with_optimum(root, scratch)
            | build_with_neural_compressor(std, scratch, tokens)
            | build_with_openvino(std, scratch, tokens)
        )
        cells = [
            Cell(workspace.model, name, RUNTIMES.get(name.split("-")[0], "onnx"), "cpu", artifact)
            for name, artifact in {**{name: artifacts[name] for name in names}, **peers}.items()
        ]
        cells = [cell.with_own_encoder(root.manifest) if cell.variant in variants else cell for cell in cells]
        backends = {**BACKENDS, "openvino": Backend("openvino_peer:OpenVinoSession", ())}
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # worker processes import `openvino_peer`
        result = measure_all(cells, root, full, progress, backends=backends)
    result.write(STUDIES / f"{save_as or f'peers-{shape}'}.json")
    print_table(compare([result], f"{PEER}@cpu"))
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
