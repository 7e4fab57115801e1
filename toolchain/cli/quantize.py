"""Quantize: builds a variant with fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.artifacts.steps import QUANTIZE_PASSES, QUANTIZED
from toolchain.cli.building import build
from toolchain.cli.completion import complete_files, complete_variants
from toolchain.cli.options import (
    dry_run_option,
    json_option,
    model_options,
    name_option,
    no_pass_option,
    open_workspace,
    training_options,
)
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.build.workspace import Workspace
    from toolchain.data.inputs import TrainingSource
    from toolchain.step_requests import QuantizeRequest


@click.command()
@click.option(
    "--backend", type=click.Choice(list(QUANTIZED)), default="ort", show_default=True, help="Library that quantises."
)
@click.option(
    "--scheme",
    type=click.Choice(list(dict.fromkeys(scheme for schemes in QUANTIZED.values() for scheme in schemes))),
    help="Schemes of ort: dynamic, static, int4, fp16 (onnx-fp16, for CUDA; onnx-webgpu-fp16, for browsers); "
    "of torch: int8, bf16, fp16; of bnb: int8, nf4, fp4; of torchao: int8.  "
    "[default: the backend's first scheme]",
)
@click.option(
    "--isa",
    type=click.Choice(["vnni", "portable", "auto"]),
    default="vnni",
    show_default=True,
    help="ort only: processors on which int8 sums must not saturate. vnni: x86 with VNNI or AMX, ARM, WebAssembly. "
    "portable: all processors, with weights of 7 bits (onnx-int8-portable). auto: this processor.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["int8", "int4"]),
    help="ort only: bits of the embedding tables.  [default: the scheme's bits]",
)
@click.option(
    "--from",
    "parents",
    multiple=True,
    metavar="VARIANT",
    shell_complete=complete_variants,
    help="Variant to quantise; the option can be repeated.  [default: onnx-fp32 for ort (onnx-std for fp16 on CUDA), "
    "else torch-fp32]",
)
@click.option(
    "--keep-fp32",
    type=click.IntRange(1),
    metavar="N",
    help="ort only: keep in fp32 the N linear layers that are most sensitive on held-out rows of the training data.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Instead of --keep-fp32: keep as few layers in fp32 as this accuracy drop allows on the held-out rows.",
)
@click.option("--sensitivity", is_flag=True, help="Only show the sensitivity of each linear layer, the highest first.")
@no_pass_option(sorted(set(chain(*QUANTIZE_PASSES.values()))), "ort only: omit this pass")
@click.option(
    "--trim-vocab",
    metavar="CORPUS",
    shell_complete=complete_files,
    help="ort only: drop tokens that do not occur in CORPUS. The vocabulary and the embedding table become smaller. "
    "CORPUS is a file or folder of texts, or `train` for the training data. --text-column names the column of texts.",
)
@training_options
@name_option
@json_option
@dry_run_option
@model_options
def quantize(
    model: str,
    exported: Path,
    folder_name: str | None,
    backend: str,
    scheme: str | None,
    isa: str,
    embeddings: str | None,
    parents: tuple[str, ...],
    keep_fp32: int | None,
    max_drop: float | None,
    sensitivity: bool,
    omitted_passes: tuple[str, ...],
    trim_vocab: str | None,
    train: TrainingSource,
    label: str,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Quantise a variant: onnx-fp32 becomes onnx-int8; torch-fp32 becomes torch-int8 or bnb-nf4.

    The int8 schemes choose activation scales at run time, except ort's static scheme. The static scheme chooses the
    scales in advance, on training sentences. With static scales, the logits of a sentence do not depend on the other
    sentences of its batch. The backend torchao chooses one scale for each token, and PyTorch compiles its models. The
    backend bnb (bitsandbytes) makes the weights smaller, not always faster.

    The command stores a variant only if the variant passes validation. Validation compares two labels for each of 200
    sentences: the variant's label and the PyTorch model's label. Validation fails if these two labels differ in too
    many of the 200 sentences. The number of differing labels is too high if it shows, with 95 % confidence, that the
    labels differ in more than 2 % of all possible sentences.

    \b
    Examples:
      toolchain quantize --backend ort
      toolchain quantize --from onnx-pruned30 --from onnx-pruned50
      toolchain quantize --isa portable
      toolchain quantize --scheme static
      toolchain quantize --scheme int4
      toolchain quantize --scheme fp16
      toolchain quantize --from onnx-webgpu --scheme fp16
      toolchain quantize --embeddings int4 --name small
      toolchain quantize --no-pass quantize-embedding --name fp32-tables
      toolchain quantize --scheme static --no-pass smooth --name rough
      toolchain quantize --scheme int4 --trim-vocab train --name tiny
      toolchain quantize --sensitivity
      toolchain quantize --keep-fp32 2 --name careful
      toolchain quantize --from onnx-std
      toolchain quantize --backend torch --scheme int8 --from torch-fp32 --from torch-pruned30
      toolchain quantize --backend torchao
      toolchain quantize --backend bnb --scheme nf4
    """
    from toolchain.build.trimming import corpus_of
    from toolchain.cli.progress import bar, say
    from toolchain.step_requests import QuantizeRequest, isa_of

    if sensitivity and (keep_fp32 is not None or max_drop is not None):
        raise click.UsageError("Give only one of --keep-fp32, --max-drop and --sensitivity.")
    if sensitivity and trim_vocab:
        raise click.UsageError("--sensitivity cannot be used with --trim-vocab, which does not change linear layers.")
    if max_drop is not None and dry_run:
        raise click.UsageError("--max-drop cannot be used with --dry-run.")
    if as_json and not sensitivity:
        raise click.UsageError("--json needs --sensitivity.")
    corpus = corpus_of(trim_vocab, train.columns.text)
    request = QuantizeRequest(
        parents,
        backend,
        scheme,
        isa_of(isa, say),
        embeddings,
        # The sensitivity is a measurement of each layer alone. The checks of settings need any number of fp32 layers.
        1 if sensitivity else keep_fp32,
        max_drop,
        omitted_passes,
        corpus.digest if corpus else trim_vocab,
        label,
    )
    workspace = open_workspace(model, exported, folder_name, train, corpus)
    if sensitivity:
        _print_sensitivity(workspace, request, as_json)
        return
    build(workspace, request.steps(workspace, say, bar), dry_run)


def _print_sensitivity(workspace: Workspace, request: QuantizeRequest, as_json: bool) -> None:
    """Prints the sensitivity of each linear layer of each parent."""
    from toolchain.artifacts.variants import derive_variant
    from toolchain.cli.progress import bar, say
    from toolchain.quantization.sensitivity import SENTENCES, rank
    from toolchain.system.escaping import escape_line
    from toolchain.tuning.settings import sensitivity_setup

    layers_by_parent = {}
    for parent in request.chosen_parents:
        derive_variant(parent, request.step, request.label)  # raises the error of a wrong parent
        setup = sensitivity_setup(workspace, parent, request.step, say, bar)
        with bar(parent) as progress:
            layers_by_parent[parent] = rank(setup, progress)
    if as_json:
        echo_json({parent: [asdict(layer) for layer in layers] for parent, layers in layers_by_parent.items()})
        return
    for parent, layers in layers_by_parent.items():
        echo(f"{parent}: each layer quantised separately, measured on {SENTENCES} held-out rows of the training data")
        for layer in layers:
            flips = "" if layer.flips is None else f"   {layer.flips:3} flips"
            echo(f"{escape_line(layer.name):48} divergence {layer.divergence:8.2g} nats{flips}")
