"""Quantize: reduces the bits of weights and arithmetic."""

from __future__ import annotations

import dataclasses

from toolchain.artifacts.steps import QUANTIZE_PASSES, Quantize
from toolchain.artifacts.store import Artifact, copy_companions
from toolchain.backends import bnb, reduced
from toolchain.backends.pytorch import check_stored, describe, load_model, save_weights
from toolchain.build import trimming
from toolchain.build.job import Built, Job
from toolchain.build.rewriting import rewrite_into
from toolchain.data.inputs import TrainingSource
from toolchain.errors import GraphError
from toolchain.models.checkpoints import WEIGHTS
from toolchain.passes.quantize_static import Activation
from toolchain.quantization.calibration import calibrate
from toolchain.quantization.sensitivity import SensitivitySetup, rank

VERSION = 5


def quantize(job: Job[Quantize]) -> Built:
    """Quantises the parent by the step's backend and scheme.

    Raises:
        GraphError: The parent has nothing to quantise, or no standard operator exists for 4-bit tables.
        ArtifactError: The stored model gives other logits than the quantised model.
    """
    return {"ort": _ort, "torch": _torch, "bnb": _bnb}[job.step.backend](job)


def _ort(job: Job[Quantize]) -> Built:
    step = job.step
    standard = job.given.manifest.variant.parts.std
    linear = linear_passes(step, standard)
    tables = step.embeddings or ("int4" if step.scheme == "int4" else "int8")
    if standard and tables == "int4":
        raise GraphError("There is no standard operator for tables of 4 bits.", "Leave --embeddings out.")
    embedding = [f"quantize-embedding{'-int4' if tables == 'int4' else ''}"] if _has(step, "quantize-embedding") else []
    activations = activations_of(job.given, step, job.train) if linear else {}
    ranked = (
        rank(SensitivitySetup.load(job.given, linear, job.train, activations), job.progress) if step.keep_fp32 else []
    )
    keep = [layer.name for layer in ranked[: step.keep_fp32]]
    tokens = trimming.tokens_to_keep(job) if step.trim_vocab else []
    passes = [*(["trim-vocabulary"] if tokens else []), *linear, *embedding]
    built = rewrite_into(job, passes, keep, activations, tokens)
    # A model with only quantised tables counts as quantised only if the step leaves linear layers out.
    if not any(built.facts["rewrites"][name] for name in (linear or embedding)[-1:]):
        what = "linear layer" if linear else "embedding table"
        raise GraphError(
            f"{job.given.manifest.variant} has no {what} left to quantise.", "Quantise the variant it was made from."
        )
    facts = dict(built.facts)
    if ranked:
        facts |= {"kept_fp32": keep, "sensitivity": [dataclasses.asdict(layer) for layer in ranked]}
    if tokens:
        facts |= trimming.trim(job, tokens, embedding, facts)
    return dataclasses.replace(built, facts=facts)


def linear_passes(step: Quantize, standard: bool) -> tuple[str, ...]:
    """Returns the passes that quantise linear layers, in order; only the last one quantises.

    Args:
        step: The quantisation.
        standard: Whether the graph has standard operators only, which the passes then keep.

    Returns:
        Names of the passes; empty if the step leaves linear layers out.
    """
    *before, last, _ = QUANTIZE_PASSES[step.scheme]
    if not _has(step, last):
        return ()
    form = {"int4": "-int4", "static": "-static"}.get(step.scheme, "-portable" if step.reduce_range else "")
    std = "-std" if standard and step.scheme != "int4" else ""
    return *(name for name in before if _has(step, name)), f"{last}{std}{form}"


def _has(step: Quantize, name: str) -> bool:
    return step.passes is None or name in step.passes


def activations_of(artifact: Artifact, step: Quantize, train: TrainingSource) -> dict[str, Activation]:
    """Calibrates a static scheme on training data and returns the result of `calibrate`; empty for other schemes."""
    return calibrate(artifact, train, _has(step, "smooth")) if step.scheme == "static" else {}


def _torch(job: Job[Quantize]) -> Built:
    model = load_model(job.given.path)
    made, precision = reduced.reduce(model, job.step.scheme)
    tensors = reduced.tensors_of(made, precision)
    copy_companions(job.given, job.folder)
    precision.write(job.folder)
    save_weights(tensors, job.folder)
    check_stored(made, job.folder, [spec.name for spec in job.given.manifest.inputs])
    return Built.like(job, describe(model, tensors))


def _bnb(job: Job[Quantize]) -> Built:
    from safetensors.torch import load_file

    copy_companions(job.given, job.folder)
    model = bnb.quantize_model(job.given.path, job.step.scheme)
    # The first forward pass rearranges bitsandbytes' 4-bit weights, and a save after it writes wrong weights.
    model.save_pretrained(job.folder, max_shard_size="100GB")
    facts = describe(model, load_file(job.folder / WEIGHTS))
    del facts["parameters"]  # wrong count: one stored element holds two or four weights
    return Built.like(job, facts)
