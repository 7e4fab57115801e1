"""Quantize: reduces the number of bits of weights and arithmetic."""

from __future__ import annotations

import dataclasses

from toolchain.artifacts.steps import QUANTIZE_PASSES, Quantize
from toolchain.artifacts.store import Artifact, copy_companions
from toolchain.backends import bnb, reduced
from toolchain.backends.pytorch import check_stored, describe, load_model, save_weights
from toolchain.build import trimming
from toolchain.build.job import Job, StepResult
from toolchain.build.rewriting import rewrite_parent_graph
from toolchain.data.inputs import TrainingSource
from toolchain.errors import GraphError
from toolchain.models.checkpoints import WEIGHTS
from toolchain.passes.quantize_static import Activation
from toolchain.quantization.calibration import calibrate
from toolchain.quantization.sensitivity import SensitivitySetup, rank

VERSION = 5


def quantize(job: Job[Quantize]) -> StepResult:
    """Quantises the parent with the step's backend and scheme.

    Raises:
        GraphError: The parent has no linear layer or embedding table left that the step can quantise. The function also
            raises `GraphError` if the step requests 4-bit embedding tables for a graph of standard ONNX operators. No
            standard ONNX operator supports 4-bit embedding tables.
        ArtifactError: The stored model gives other logits than the quantised model.
    """
    functions = {"ort": _quantize_ort, "torch": _quantize_torch, "torchao": _quantize_torch, "bnb": _quantize_bnb}
    return functions[job.step.backend](job)


def _quantize_ort(job: Job[Quantize]) -> StepResult:
    step = job.step
    parent = job.parent_artifact.manifest.variant.parts
    linear = linear_passes(step, parent.std)
    tables = step.embeddings or ("int4" if step.scheme == "int4" else "int8")
    if parent.std and tables == "int4":
        raise GraphError("There is no standard operator for embedding tables of 4 bits.", "Leave --embeddings out.")
    if parent.webgpu and tables == "int8":
        raise GraphError("WebGPU cannot look up embeddings of 8 bits.", "Leave --embeddings out.")
    form = "".join([*(["-int4"] if tables == "int4" else []), *(["-webgpu"] if parent.webgpu else [])])
    embedding = [f"quantize-embedding{form}"] if _applies_pass(step, "quantize-embedding") else []
    activations = activations_of(job.parent_artifact, step, job.train) if linear else {}
    sensitivities = (
        rank(SensitivitySetup.load(job.parent_artifact, linear, job.train, activations), job.progress)
        if step.keep_fp32
        else []
    )
    fp32_layers = [layer.name for layer in sensitivities[: step.keep_fp32]]
    tokens = trimming.tokens_to_keep(job) if step.trim_vocab else []
    passes = [*(["trim-vocabulary"] if tokens else []), *linear, *embedding]
    result = rewrite_parent_graph(job, passes, fp32_layers, activations, tokens)
    # If the step must quantise linear layers, a graph with only quantised embedding tables is an error.
    if not any(result.facts["rewrites"][name] for name in (linear or embedding)[-1:]):
        layer_kind = "linear layer" if linear else "embedding table"
        raise GraphError(
            f"{job.parent_artifact.manifest.variant} has no {layer_kind} left to quantise.",
            "Quantise the parent of this variant instead.",
        )
    facts = dict(result.facts)
    if sensitivities:
        facts |= {"kept_fp32": fp32_layers, "sensitivity": [dataclasses.asdict(layer) for layer in sensitivities]}
    if tokens:
        facts |= trimming.trim(job, tokens, embedding, facts)
    return dataclasses.replace(result, facts=facts)


def linear_passes(step: Quantize, is_standard: bool) -> tuple[str, ...]:
    """Returns the passes that prepare and quantise linear layers, in order; only the last pass quantises.

    Args:
        step: The quantisation.
        is_standard: Whether the graph has, and must keep, only standard operators.

    Returns:
        Names of the passes; empty if the step does not quantise linear layers.
    """
    *preparations, linear_pass, _ = QUANTIZE_PASSES[step.scheme]
    if not _applies_pass(step, linear_pass):
        return ()
    form = {"int4": "-int4", "static": "-static"}.get(step.scheme, "-portable" if step.reduce_range else "")
    std = "-std" if is_standard and step.scheme != "int4" else ""
    return *(name for name in preparations if _applies_pass(step, name)), f"{linear_pass}{std}{form}"


def _applies_pass(step: Quantize, name: str) -> bool:
    return step.passes is None or name in step.passes


def activations_of(artifact: Artifact, step: Quantize, train: TrainingSource) -> dict[str, Activation]:
    """Calibrates a static scheme on training data and returns the result of `calibrate`; empty for other schemes."""
    return calibrate(artifact, train, _applies_pass(step, "smooth")) if step.scheme == "static" else {}


def _quantize_torch(job: Job[Quantize]) -> StepResult:
    model = load_model(job.parent_artifact.path)
    scheme = reduced.TORCHAO if job.step.backend == "torchao" else job.step.scheme
    reduced_model, precision = reduced.reduce(model, scheme)
    tensors = reduced.tensors_of(reduced_model, precision)
    copy_companions(job.parent_artifact, job.folder)
    precision.write(job.folder)
    save_weights(tensors, job.folder)
    check_stored(reduced_model, job.folder, [spec.name for spec in job.parent_artifact.manifest.inputs])
    return StepResult.from_parent(job, describe(model, tensors))


def _quantize_bnb(job: Job[Quantize]) -> StepResult:
    from safetensors.torch import load_file

    copy_companions(job.parent_artifact, job.folder)
    model = bnb.quantize_model(job.parent_artifact.path, job.step.scheme)
    # Save before the first forward pass, which rearranges bitsandbytes' 4-bit weights: a later save would be wrong.
    model.save_pretrained(job.folder, max_shard_size="100GB")
    facts = describe(model, load_file(job.folder / WEIGHTS))
    del facts["parameters"]  # `describe` counts stored elements, but one stored element holds two 4-bit weights
    return StepResult.from_parent(job, facts)
