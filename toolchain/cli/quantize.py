"""The command that takes bits away: quantize."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.artifacts.variants import QUANTIZE_PASSES, QUANTIZED
from toolchain.cli.building import build
from toolchain.cli.options import (
    dry_run_option,
    json_option,
    model_options,
    name_option,
    no_pass_option,
    open_workspace,
    training_options,
)

if TYPE_CHECKING:
    from toolchain.artifacts.variants import Quantize, Step
    from toolchain.build.workspace import Workspace
    from toolchain.data.inputs import TrainingSource


@click.command()
@click.option(
    "--backend", type=click.Choice(list(QUANTIZED)), default="ort", show_default=True, help="Whose quantisation it is."
)
@click.option(
    "--scheme",
    type=click.Choice(list(dict.fromkeys(scheme for schemes in QUANTIZED.values() for scheme in schemes))),
    help="ort: dynamic, static, int4, fp16 (onnx-fp16, for CUDA). torch: int8, bf16, fp16. bnb: int8, nf4, fp4.  "
    "[default: the backend's first]",
)
@click.option(
    "--isa",
    type=click.Choice(["vnni", "portable", "auto"]),
    default="vnni",
    show_default=True,
    help="ort: which processors it must be exact on. vnni: x86 with VNNI or AMX, ARM, WebAssembly. portable: all, with "
    "weights of 7 bits (onnx-int8-portable). auto: this one.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["int8", "int4"]),
    help="ort: bits of the embedding tables.  [default: the scheme's]",
)
@click.option(
    "--from",
    "parents",
    multiple=True,
    metavar="VARIANT",
    help="What is quantised; may repeat.  [default: onnx-fp32 for ort (onnx-std for fp16), else torch-fp32]",
)
@click.option(
    "--keep-fp32",
    type=click.IntRange(1),
    metavar="N",
    help="ort: leave the N linear layers in fp32 that lose most, by held-out rows of the training data.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Instead: as few in fp32 as lose at most this accuracy on these rows.",
)
@click.option("--sensitivity", is_flag=True, help="Only show what each linear layer loses, the most sensitive first.")
@no_pass_option(sorted(set(chain(*QUANTIZE_PASSES.values()))), "ort: leave this rewrite out")
@click.option(
    "--trim-vocab",
    metavar="CORPUS",
    help="ort: leave out of vocabulary and table the tokens that CORPUS, a file of texts, has no use for; `train`: the "
    "training data. --text-column is its column as well.",
)
@training_options
@name_option
@json_option
@dry_run_option
@model_options
def quantize(
    model: str,
    exported: Path,
    slug: str | None,
    backend: str,
    scheme: str | None,
    isa: str,
    embeddings: str | None,
    parents: tuple[str, ...],
    keep_fp32: int | None,
    max_drop: float | None,
    sensitivity: bool,
    left_out: tuple[str, ...],
    trim_vocab: str | None,
    train: TrainingSource,
    label: str,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Quantise a variant: onnx-fp32 becomes onnx-int8, torch-fp32 torch-int8 or bnb-nf4.

    ort and torch int8 scale activations at run time, but for ort's static: that fixes scales on training sentences, so
    that an answer does not depend on its batch. bnb is bitsandbytes, which saves memory and, on a CPU, no time.
    Validated before it is published: it is refused where 200 sentences show that more than 2 % are answered differently
    from the PyTorch model it was made from.

    \b
    Examples:
      toolchain quantize --backend ort
      toolchain quantize --from onnx-pruned30 --from onnx-pruned50
      toolchain quantize --isa portable
      toolchain quantize --scheme static
      toolchain quantize --scheme int4
      toolchain quantize --scheme fp16
      toolchain quantize --embeddings int4 --name small
      toolchain quantize --no-pass quantize-embedding --name fp32-tables
      toolchain quantize --scheme static --no-pass smooth --name rough
      toolchain quantize --scheme int4 --trim-vocab train --name tiny
      toolchain quantize --sensitivity
      toolchain quantize --keep-fp32 2 --name careful
      toolchain quantize --from onnx-std
      toolchain quantize --backend torch --scheme int8 --from torch-fp32 --from torch-pruned30
      toolchain quantize --backend bnb --scheme nf4
    """
    from toolchain.artifacts.variants import Optimize, Quantize, child
    from toolchain.backends.ort import saturates
    from toolchain.build.trimming import corpus_of
    from toolchain.cli.progress import bar, say
    from toolchain.tuning.settings import fewest_kept

    if isa != "vnni" and (backend, scheme or "dynamic") != ("ort", "dynamic"):
        raise click.BadParameter("Only --backend ort --scheme dynamic has weights of 7 bits.", param_hint="--isa")
    if isa == "auto":
        isa = "portable" if saturates() else "vnni"
        click.echo(f"isa auto: {isa} on this processor", err=True)
    layers = [keep_fp32, max_drop is not None, sensitivity]
    if backend != "ort" and any([embeddings, left_out, trim_vocab, *layers]):
        raise click.UsageError(
            "--embeddings, --no-pass, --trim-vocab, --keep-fp32, --max-drop and --sensitivity are for --backend ort."
        )
    if sum(map(bool, layers)) > 1 or (dry_run and max_drop is not None):
        raise click.UsageError("Of --keep-fp32, --max-drop and --sensitivity name one; --max-drop has no --dry-run.")
    if sensitivity and trim_vocab:
        raise click.UsageError("--sensitivity is about linear layers, and --trim-vocab changes none.")
    without = {name for name in ("quantize-linear", "quantize-embedding") if name in left_out}
    if "quantize-linear" in without and any([len(without) > 1, isa != "vnni", scheme == "static", *layers]):
        raise click.BadParameter("Without quantize-linear only --embeddings is left to choose.", param_hint="--no-pass")
    if "quantize-embedding" in without and embeddings:
        raise click.BadParameter("Without quantize-embedding there are no bits of tables.", param_hint="--embeddings")
    if as_json and not sensitivity:
        raise click.UsageError("--json is for --sensitivity.")
    schemes = list(QUANTIZED[backend])
    if scheme is not None and scheme not in schemes:
        raise click.BadParameter(f"--backend {backend} has {', '.join(schemes)}.", param_hint="--scheme")
    if (backend, scheme) == ("ort", "fp16"):
        if any([embeddings, left_out, trim_vocab, *layers]):
            raise click.UsageError("--scheme fp16 is half precision throughout: it takes no other option of ort's.")
        half = Optimize.for_provider("cuda")
        workspace = open_workspace(model, exported, slug)
        build(workspace, {child(parent, half, label).name: half for parent in parents or ("onnx-std",)}, dry_run)
        return
    seven_bits = True if isa == "portable" else None
    corpus = corpus_of(trim_vocab, train.columns.text)
    step = Quantize(backend, scheme or schemes[0], seven_bits, embeddings, keep_fp32)
    trimmed = corpus.digest if corpus else trim_vocab
    step = replace(step, trim_vocab=trimmed, passes=_left(step.scheme, left_out) if left_out else None)
    chosen = parents or (("onnx-fp32",) if backend == "ort" else ("torch-fp32",))
    names = {parent: child(parent, step, label).name for parent in chosen}
    workspace = open_workspace(model, exported, slug, train, corpus)
    if sensitivity:
        _sensitivity(workspace, names, step, as_json)
        return
    asked: dict[str, Step] = {}
    for parent, name in names.items():
        fewest = fewest_kept(workspace, parent, step, max_drop, say, bar) if max_drop is not None else keep_fp32
        asked[name] = replace(step, keep_fp32=fewest or None)
    build(workspace, asked, dry_run)


def _left(scheme: str, left_out: tuple[str, ...]) -> tuple[str, ...]:
    """The scheme's passes without those: where linear layers stay, only what is about tables."""
    every = QUANTIZE_PASSES[scheme]
    if not set(left_out) <= set(every):
        raise click.BadParameter(f"--scheme {scheme} has {', '.join(every)}.", param_hint="--no-pass")
    left = tuple(name for name in every if name not in left_out)
    return left if "quantize-linear" in left else left[-1:]


def _sensitivity(workspace: Workspace, parents: Iterable[str], step: Quantize, as_json: bool) -> None:
    """Prints what every linear layer of every parent loses."""
    from toolchain.cli.progress import bar, say
    from toolchain.quantization.sensitivity import SENTENCES, rank
    from toolchain.tuning.settings import sensitive

    found = {}
    for parent in parents:
        subject = sensitive(workspace, parent, step, say, bar)
        with bar(parent) as progress:
            found[parent] = rank(subject, progress)
    if as_json:
        click.echo(
            json.dumps({parent: [asdict(layer) for layer in layers] for parent, layers in found.items()}, indent=1)
        )
        return
    for parent, layers in found.items():
        click.echo(f"{parent}: each layer quantised alone, {SENTENCES} held-out rows of the training data")
        for layer in layers:
            click.echo(f"{layer.name:48} divergence {layer.divergence:8.2g} nats   {layer.flips:3} answered otherwise")
