"""`onnx-int8` against what others make of the same checkpoint, interleaved in one run.

    python benchmarks/peers.py [--shape reference|base] [--exported exported] [--variant NAME ...] [--full]
                               [--save-as NAME]

Peers are built in scratch folders: optimum-cli's int8 (`--avx512_vnni`, per tensor and per channel), Neural
Compressor's int8 of the graph that optimum-cli exports (dynamic and static, run by the same ONNX Runtime), OpenVINO's
own runtime in fp32 and in int8 by NNCF. All are measured between this toolchain's variants under the same clock; how
many times faster `onnx-int8`, `onnx-int8-static` and what `--variant` names are than each is printed with its 95 %
bootstrap interval over rounds. `base` is the shape of DistilBERT-base with random weights, for speed alone. The result
file goes to benchmarks/studies/.
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
from toolchain.bench.run import result_of
from toolchain.bench.runner import Progress, bench
from toolchain.bench.scenarios import FULL, QUICK
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.compare.report.table import print_table
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.models import checkpoints
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, ResultFile, Samples
from toolchain.system import hardware

OURS = ("torch-fp32", "torch-bf16", "torch-int8", "onnx-fp32", "onnx-int8", "onnx-int8-static")
PEER = "optimum-cli-int8"
RUNTIMES = {"torch": "torch", "openvino": "openvino"}  # by how a row's name begins; ONNX Runtime for the others
STUDIES = Path(__file__).parent / "studies"
CALIBRATION = 300  # sentences of the training data


def base_shape(folder: Path) -> Path:
    """A checkpoint of DistilBERT-base's shape: random, but decided, so that fewer bits change no answer."""
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
    """The embedded model under `exported`, or one of the other shape, all of it in `scratch`."""
    if shape == "reference":
        return Workspace.open(shape, exported)
    (scratch / "checkpoint").mkdir()
    return Workspace.open(str(base_shape(scratch / "checkpoint")), scratch / "artifacts", f"{shape}-shape")


def encoder_of(root: Artifact) -> inputs.Encoder:
    """Sentences into what the model of `root` reads."""
    return inputs.Encoder.open(root.path, [spec.name for spec in root.manifest.inputs], root.manifest.max_length)


def measure_all(cells: Sequence[Cell], root: Artifact, full: bool, progress: Progress, **more: Any) -> ResultFile:
    """Every cell on the validation set, interleaved in one run; `more` goes to `bench`."""
    data = inputs.load(None, root.label_set)
    protocol = replace(FULL if full else QUICK, threads=hardware.cores())
    rows, how = bench(cells, data, encoder_of(root), protocol, progress, **more)
    return result_of(rows, how, data, root.manifest.max_length)


def by_optimum(parent: Artifact, scratch: Path) -> dict[str, Artifact]:
    """optimum-cli's int8 of the checkpoint in `parent`, as artifacts the benchmark can open; the fp32 graph it exports
    first stays in ``scratch/exported``."""
    cli = Path(sys.executable).with_name("optimum-cli")
    exported = scratch / "exported"
    _run(cli, "export", "onnx", "--model", parent.path, "--task", "text-classification", exported)
    found = {}
    for name, options in ((PEER, []), (f"{PEER}-per-channel", ["--per_channel"])):
        quantized = scratch / name
        _run(cli, "onnxruntime", "quantize", "--onnx_model", exported, "--avx512_vnni", *options, "-o", quantized)
        (quantized / "model_quantized.onnx").rename(quantized / "model.onnx")
        found[name] = as_artifact(parent, name, quantized, "optimum-cli")
    return found


def by_neural_compressor(std: Artifact, scratch: Path, tokens: Path) -> dict[str, Artifact]:
    """Neural Compressor's int8 of the graph that `by_optimum` exported, calibrated on the sentences in `tokens`."""
    python = environment(scratch / "neural-compressor", neural_compressor_peer.PACKAGES)
    found = {}
    for approach in ("dynamic", "static"):
        folder = scratch / f"neural-compressor-{approach}"
        folder.mkdir()
        script = (neural_compressor_peer.__file__, scratch / "exported" / "model.onnx", tokens)
        _run(python, *script, folder / "model.onnx", approach, at=scratch)  # where it leaves a log of its tuning
        store.copy_companions(std, folder)
        found[folder.name] = as_artifact(std, folder.name, folder, "Neural Compressor")
    return found


def by_openvino(std: Artifact, scratch: Path, tokens: Path) -> dict[str, Artifact]:
    """OpenVINO's fp32 and int8 of the exported graph, calibrated on the sentences in `tokens`."""
    python = environment(scratch / "openvino", openvino_peer.PACKAGES)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    os.environ[openvino_peer.SITE] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    plain, quantized = scratch / "openvino-fp32", scratch / "openvino-int8"
    for folder in (plain, quantized):
        folder.mkdir()
        store.copy_companions(std, folder)
    shutil.copyfile(std.onnx_path, plain / "model.onnx")
    _run(python, openvino_peer.__file__, std.onnx_path, tokens, quantized / "model.xml")
    return {folder.name: as_artifact(std, folder.name, folder, "OpenVINO") for folder in (plain, quantized)}


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The Python of a scratch environment that has these packages."""
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
    return python


def _run(*command: str | Path, at: Path | None = None) -> None:
    done = subprocess.run(list(map(str, command)), cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )


def as_artifact(parent: Artifact, name: str, folder: Path, maker: str) -> Artifact:
    """What somebody made of `parent`, for the benchmark to open."""
    files = store.list_files(folder)
    return Artifact(folder, replace(parent.manifest, variant=name, files=files, facts={"made_by": maker}))


def ratio(ours: Samples, peer: Samples) -> str:
    """Peer's time / ours, round by round, with its 95 % interval; above 1, ours is faster."""
    found = statistics.ratio(peer.spent_each(), ours.spent_each())
    return f"{found.value:.2f}× [{found.low:.2f}, {found.high:.2f}]"


def measured(row: Measurement) -> tuple[Samples, Samples]:
    """Both samples of a row that was measured."""
    if row.latency is None or row.batches is None:
        raise click.ClickException(f"{row.cell}: {row.reason} {row.mend}")
    return row.latency, row.batches


def summary(result: ResultFile) -> list[str]:
    """Lines for each quantised ONNX file of the toolchain's: how it stands to every other cell."""
    names = [row.variant for row in result.rows if is_variant(row.variant)]
    ours = [name for name in names if _is_quantised(name)]
    return [line for name in ours for line in against_others(result, name)]


def _is_quantised(name: str) -> bool:
    parts = VariantName(name).parts
    return parts.runtime == "onnx" and parts.scheme != "fp32"


def against_others(result: ResultFile, name: str) -> list[str]:
    """A line for each other cell: how many times as fast the variant `name` is; accuracies, whether they differ."""
    ours = next(row for row in result.rows if row.variant == name)
    size, labels = result.run["batch_size"], result.data.get("labels")
    lines = [name]
    for row in result.rows:
        tuned = is_variant(row.variant) and _is_quantised(row.variant) and row.variant not in OURS
        if row is ours or tuned or not (row.accuracy and ours.accuracy):
            continue
        single, batched = (ratio(mine, theirs) for mine, theirs in zip(measured(ours), measured(row), strict=True))
        accuracy = f"accuracy {ours.accuracy.value:.2%} against {row.accuracy.value:.2%}"
        if labels and row.predictions:
            answers = list(zip(ours.predictions, row.predictions, labels, strict=True))
            lost = sum(mine != label == theirs for mine, theirs, label in answers)
            won = sum(mine == label != theirs for mine, theirs, label in answers)
            accuracy += f" (p = {statistics.mcnemar(lost, won):.2f})"
        lines.append(f"  over {row.variant:28} batch 1: {single}   batches of {size}: {batched}   {accuracy}")
    return lines


@click.command()
@click.option("--shape", type=click.Choice(["reference", "base"]), default="reference", show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--variant", "more", multiple=True, help="Also this one of the toolchain's; may repeat.")
@click.option("--full", is_flag=True, help="About 60 s a cell instead of 20.")
@click.option("--save-as", help="[default: peers-SHAPE]")
def main(shape: str, exported: Path, more: tuple[str, ...], full: bool, save_as: str | None) -> None:
    """Builds, measures, prints, saves."""
    with tempfile.TemporaryDirectory() as folder, bar("peers") as progress:
        scratch = Path(folder)
        workspace = open_shape(shape, exported, scratch)
        names = (*OURS, *more)
        built = ensure(workspace, names, {}, say)
        root, std = built["torch-fp32"], built["onnx-std"]
        train = inputs.embedded("train")
        chosen = inputs.sentence_rows(train, inputs.hold_out(train)[0], CALIBRATION)
        tokens = scratch / "tokens.json"
        tokens.write_text(json.dumps(encoder_of(root).encode([train.texts[row] for row in chosen])))
        peers = (
            by_optimum(root, scratch) | by_neural_compressor(std, scratch, tokens) | by_openvino(std, scratch, tokens)
        )
        cells = [
            Cell(workspace.model, name, RUNTIMES.get(name.split("-")[0], "onnx"), "cpu", artifact)
            for name, artifact in {**{name: built[name] for name in names}, **peers}.items()
        ]
        cells = [cell.reading_as(root.manifest) if cell.variant in more else cell for cell in cells]
        backends = {**BACKENDS, "openvino": Backend("openvino_peer:OpenVinoSession", ())}
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where a measuring process finds that session
        result = measure_all(cells, root, full, progress, backends=backends)
    result.write(STUDIES / f"{save_as or f'peers-{shape}'}.json")
    print_table(compare([result], f"{PEER}@cpu"))
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
