"""Quantize: fewer bits in weights and arithmetic."""

from __future__ import annotations

from toolchain.artifacts import copy_companions
from toolchain.backends import bnb, reduced
from toolchain.backends.pytorch import check_stored, describe, load_model, save_weights
from toolchain.checkpoints import WEIGHTS
from toolchain.errors import GraphError
from toolchain.jobs import Built, Job
from toolchain.names import parse_name
from toolchain.passes.apply import rewrite_into
from toolchain.variants import Quantize

VERSION = 1


def quantize(job: Job) -> Built:
    """Quantises the parent by the step's backend and scheme.

    Raises `GraphError` where there is nothing to quantise, `ArtifactError` where what was stored does not answer as
    what was quantised.
    """
    step = job.step
    assert isinstance(step, Quantize)
    return {"ort": _ort, "torch": _torch, "bnb": _bnb}[step.backend](job, step)


def _ort(job: Job, step: Quantize) -> Built:
    # A graph of standard operators keeps to them.
    standard, portable = parse_name(job.given.manifest.variant).std, step.reduce_range
    linear = f"quantize-linear{'-std' if standard else ''}{'-portable' if portable else ''}"
    if step.scheme == "int4":
        linear = "quantize-linear-int4"
    tables = step.embeddings or ("int4" if step.scheme == "int4" else "int8")
    if standard and tables == "int4":
        raise GraphError("There is no standard operator for tables of 4 bits.", "Leave --embeddings out.")
    built = rewrite_into(job, (linear, f"quantize-embedding{'-int4' if tables == 'int4' else ''}"))
    if not built.facts["rewrites"][linear]:
        raise GraphError(
            f"{job.given.manifest.variant} has no linear layer left to quantise.",
            "Quantise the variant it was made from.",
        )
    return built


def _torch(job: Job, step: Quantize) -> Built:
    model = load_model(job.given.path)
    made, precision = reduced.reduce(model, step.scheme)
    tensors = reduced.tensors_of(made, precision)
    copy_companions(job.given, job.folder)
    save_weights(tensors, job.folder)
    precision.write(job.folder)
    check_stored(made, job.folder, [spec.name for spec in job.given.manifest.inputs])
    return Built.like(job, describe(model, tensors))


def _bnb(job: Job, step: Quantize) -> Built:
    from safetensors.torch import load_file

    copy_companions(job.given, job.folder)
    model = bnb.quantized(job.given.path, step.scheme)
    # Before the first answer: bitsandbytes rearranges 4-bit weights then, and stores them wrong.
    model.save_pretrained(job.folder, max_shard_size="100GB")
    facts = describe(model, load_file(job.folder / WEIGHTS))
    del facts["parameters"]  # packed: two or four in one
    return Built.like(job, facts)
