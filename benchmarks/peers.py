"""Measures `onnx-int8` and the models that other tools build from the same checkpoint, interleaved in one run.

    python benchmarks/peers.py [--shape reference|base] [--exported exported] [--variant NAME ...] [--peer NAME ...]
                               [--environments FOLDER] [--full] [--save-as NAME]

In this file, a peer is a tool other than the toolchain. `engines/table.py` lists the peers, and the module of each peer
states how it builds and runs its models. Each peer has a Python environment of its own, with the pinned packages in
`engines/requirements/`. The script makes the environments once and keeps them in a folder, `exported/.cache/peers` by
default. The peers write their models to scratch folders.

The toolchain's ONNX Runtime runs the models of optimum-cli, Neural Compressor and Olive. All other models run in a
process of the peer's environment, on the same number of threads as the toolchain's variants. One benchmark run measures
all models. If a peer cannot be installed, or cannot build or run its models, the result file states the reason, and the
run continues without them.

For `onnx-int8`, `onnx-int8-static` and the variants of `--variant`, the script prints speed-ups over the other models,
with 95 % bootstrap intervals over rounds. `--shape base` measures a model of DistilBERT-base's shape with random
weights, for speed only, also with an exit that half of the sentences use (`half_exits.py`). The script writes the
result file to benchmarks/studies/.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import half_exits
from engines.sources import Sources
from engines.table import ENGINES, build_all, share_engines

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
from toolchain.errors import BenchError, ToolchainError
from toolchain.models import checkpoints
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, Samples
from toolchain.results.result_file import ResultFile
from toolchain.system import hardware

OURS = (
    "torch-fp32",
    "torch-bf16",
    "torch-compile",
    "torch-compile-bf16",
    "torch-int8",
    "torchao-int8",
    "onnx-fp32",
    "onnx-int8",
    "onnx-int8-static",
)
PARENTS = ("torch-fp32", "onnx-std")  # the peers build their models from these variants
BASELINES = ("optimum-cli-int8", "torch-fp32")  # the printed table's baseline is the first of them that was measured
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


def own_cells(workspace: Workspace, names: Sequence[str]) -> list[Cell]:
    """Returns the cells of the toolchain's variants; a variant that cannot be built has the error in its cell."""
    cells = []
    for name in names:
        runtime = VariantName(name).parts.runtime
        try:
            artifact = ensure(workspace, (name,), {}, say)[name]
            cells.append(Cell(workspace.model, name, runtime, "cpu", artifact))
        except ToolchainError as error:
            cells.append(Cell(workspace.model, name, runtime, "cpu", None, "unavailable", error.cause, error.hint))
    return cells


def half_exit_cell(cells: Sequence[Cell], root: Artifact, scratch: Path) -> Cell:
    """Returns the cell of `onnx-int8` with an exit that half of the sentences use; `cells` holds `onnx-int8`."""
    cell = next(cell for cell in cells if cell.variant == "onnx-int8")
    folder = scratch / half_exits.NAME
    folder.mkdir()
    assert cell.artifact is not None
    artifact = half_exits.add_half_exit(cell.artifact, encoder_of(root), folder)
    return replace(cell, variant=VariantName(half_exits.NAME), artifact=artifact)


def write_sources(root: Artifact, std: Artifact, scratch: Path) -> Sources:
    """Writes the token ids of training sentences to `scratch`, and returns what the peers build their models from."""
    train, encoder = inputs.load_embedded("train"), encoder_of(root)
    rows, _ = inputs.hold_out(train)
    training = train.select(rows)
    calibration = train.select(inputs.sentence_rows(train, rows, CALIBRATION))
    sources = Sources(
        checkpoint=str(root.path.resolve()),
        graph=str(std.onnx_path.resolve()),
        calibration=str(scratch / "calibration.json"),
        training=str(scratch / "training.json"),
        optimum_cli=str(Path(sys.executable).with_name("optimum-cli")),
    )
    Path(sources.calibration).write_text(json.dumps(encoder.encode(calibration.texts)))
    content = {"ids": encoder.encode(training.texts), "labels": training.labels}
    Path(sources.training).write_text(json.dumps(content))
    return sources


def peer_cells(
    model: str, names: Sequence[str], sources: Sources, parent: Artifact, environments: Path, scratch: Path
) -> tuple[list[Cell], dict[str, Backend]]:
    """Builds the models of the named peers; a model that a peer cannot build has the reason in its cell.

    Args:
        model: Name of the model that the result file states.
        names: Names of the peers.
        sources: What the peers build their models from.
        parent: Artifact whose config and tokenizer count as part of each model's size.
        environments: Folder of the peers' environments.
        scratch: Folder for the peers' models.

    Returns:
        A cell for each model, and the backends of the peers that do not run on ONNX Runtime.
    """
    engines = [ENGINES[name] for name in names]
    models, backends = build_all(engines, sources, environments, scratch, say)
    cells = []
    for engine in engines:
        for name in engine.models:
            folder = models[name]
            if isinstance(folder, BenchError):
                say(f"{name} is left out: {folder}")
                cell = Cell(model, name, engine.runtime, "cpu", None, "unavailable", folder.cause, folder.hint)
            else:
                store.copy_companions(parent, folder)
                artifact = make_artifact(parent, name, folder, engine.name)
                cell = Cell(model, name, engine.runtime, "cpu", artifact)
            cells.append(cell)
    return cells, backends


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


def mcnemar(ours: Measurement, other: Measurement, result: ResultFile) -> str:
    """Returns the p-value of McNemar's exact test on the labels that two cells predict for labelled data."""
    answers = list(zip(ours.predictions, other.predictions, result.data["labels"], strict=True))
    losses = sum(own != label == peer for own, peer, label in answers)
    wins = sum(own == label != peer for own, peer, label in answers)
    return f"{statistics.mcnemar(losses, wins):.2f}"


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
            accuracy += f" (p = {mcnemar(ours, row, result)})"
        lines.append(f"  over {row.variant:28} batch 1: {latency}   batches of {size}: {throughput}   {accuracy}")
    return lines


@click.command()
@click.option("--shape", type=click.Choice(["reference", "base"]), default="reference", show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--variant", "variants", multiple=True, help="Add this variant to the measurement. Can be repeated.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice(list(ENGINES)), help="Measure only this peer. Can be repeated."
)
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    help="Folder that keeps the peers' environments.  [default: EXPORTED/.cache/peers]",
)
@click.option("--full", is_flag=True, help="Measure each cell for about 60 s instead of 20 s.")
@click.option("--save-as", help="[default: peers-SHAPE]")
def main(
    shape: str,
    exported: Path,
    variants: tuple[str, ...],
    peers: tuple[str, ...],
    environments: Path | None,
    full: bool,
    save_as: str | None,
) -> None:
    """Builds the peers' models, measures all cells, saves the result file and prints the speed-ups."""
    with tempfile.TemporaryDirectory() as folder, bar("peers") as progress:
        scratch = Path(folder)
        workspace = open_shape(shape, exported, scratch)
        share_engines()
        root, std = map(ensure(workspace, PARENTS, {}, say).get, PARENTS)
        assert root is not None
        assert std is not None
        sources = write_sources(root, std, scratch)
        cells = [cell.with_own_encoder(root.manifest) for cell in own_cells(workspace, (*OURS, *variants))]
        if shape == "base":
            cells.append(half_exit_cell(cells, root, scratch))
        others, backends = peer_cells(
            workspace.model,
            peers or tuple(ENGINES),
            sources,
            std,
            environments or exported / ".cache" / "peers",
            scratch,
        )
        result = measure_all([*cells, *others], root, full, progress, backends={**BACKENDS, **backends})
    result.write(STUDIES / f"{save_as or f'peers-{shape}'}.json")
    measured = [row.variant for row in result.rows if row.status == "ok"]
    print_table(compare([result], next((f"{name}@cpu" for name in BASELINES if name in measured), "torch-fp32@cpu")))
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
