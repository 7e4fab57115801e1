"""Alternatives to a quantisation that failed validation: settings to try, and the commands that build them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import QUANTIZE_PASSES, Quantize, uses_training_data
from toolchain.artifacts.store import Artifact
from toolchain.build.trimming import TRAIN
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.datasets import USUAL
from toolchain.data.inputs import TrainingSource
from toolchain.data.labels import LabelSet

UNDECIDED = 0.5  # logits; the second label is then at least exp(-0.5) = 61 % as probable as the first
NEARLY_ALL = 0.8  # share of the flips
OTHER_SCHEME = {"int4": "dynamic", "dynamic": "static"}  # scheme → a scheme that may have less rounding error


def undecided_flips(report: Mapping[str, Any]) -> int:
    """Returns the number of flips for which the PyTorch model's margin is at most `UNDECIDED`."""
    return sum(margin <= UNDECIDED for margin in report["flip_margins"])


def is_undecided(report: Mapping[str, Any]) -> bool:
    """Returns whether the PyTorch model is undecided in nearly all sentences that flip; see `undecided_flips`."""
    return bool(undecided_flips(report) >= NEARLY_ALL * report["flips"])


def alternatives(
    step: Quantize, report: Mapping[str, Any], saturates: bool, same_domain: bool, layers: int | None
) -> list[Quantize]:
    """Returns the settings to try instead of `step`, most promising first; empty if there is nothing to suggest.

    If decided answers flip, some layers have a large rounding error. The first suggestion then keeps more layers in
    fp32. If the model is undecided, a small rounding error flips its answers. Static scales halve that error on
    sentences of their domain: on the reference model, the mean |Δlogit| is 0.042 instead of 0.087. On other sentences
    they do not reduce it (0.0074 instead of 0.0062).

    Args:
        step: The quantisation that failed.
        report: The report of `steps.validate`.
        saturates: Whether this runtime saturates products of 8 bits. Weights of 7 bits avoid that.
        same_domain: Whether the training data has the same domain as the validation sentences.
        layers: Number of linear layers of the model; None if unknown.
    """
    if step.backend != "ort" or not (report["finite"] and report["flips"]):
        return []
    if step.passes is not None and "quantize-linear" not in step.passes:
        return []
    found = []
    if step.scheme in OTHER_SCHEME:
        found.append(_with_scheme(step, OTHER_SCHEME[step.scheme]))
    kept = 2 * (step.keep_fp32 or 1)
    if layers is None or kept < layers:
        found.append(replace(step, keep_fp32=kept))
    if step.scheme == "dynamic" and not (is_undecided(report) and same_domain):
        found.reverse()
    if saturates and step.scheme == "dynamic" and not step.reduce_range:
        found.insert(0, replace(step, reduce_range=True))
    return found


def _with_scheme(step: Quantize, scheme: str) -> Quantize:
    """Returns the step with another scheme; the new step also leaves out the passes that `step` leaves out."""
    left_out = set(QUANTIZE_PASSES[step.scheme]) - set(step.passes or QUANTIZE_PASSES[step.scheme])
    passes = tuple(name for name in QUANTIZE_PASSES[scheme] if name not in left_out)
    return replace(step, scheme=scheme, reduce_range=None, passes=None if passes == QUANTIZE_PASSES[scheme] else passes)


def hint(
    workspace: Workspace,
    name: VariantName,
    step: Quantize,
    parent: Artifact,
    report: Mapping[str, Any],
    saturates: bool,
    layers: int | None,
) -> str:
    """Returns a text that explains the flips and lists the commands to try; empty if there is nothing to suggest.

    Args:
        workspace: The model's workspace.
        name: Name of the variant that failed.
        step: The quantisation that failed.
        parent: Artifact of the variant's parent.
        report: As in `alternatives`.
        saturates: As in `alternatives`.
        layers: As in `alternatives`.
    """
    same_domain = workspace.train.file is None and inputs.embedded_fits(parent.label_set)
    found = alternatives(step, report, saturates, same_domain, layers)
    if not found:
        return ""
    of = parent.manifest.variant
    commands = [f"`{command(workspace, of, name.parts.label, each, parent.label_set)}`" for each in found]
    said = [_evidence(report)]
    if saturates and found[0].reduce_range:
        said.append("This runtime also saturates products of 8 bits, which weights of 7 bits avoid.")
    return " ".join([*said, f"Try {', then '.join(commands)}."])


def _evidence(report: Mapping[str, Any]) -> str:
    """Returns sentences that explain the margins of the flips."""
    flips, near = report["flips"], undecided_flips(report)
    if is_undecided(report):
        return (
            f"In {near} of these {flips} the PyTorch model itself is undecided: a logit that is {UNDECIDED:g} higher "
            "or lower changes its answer. Less rounding error flips fewer; longer training or more rows make it decide."
        )
    return (
        f"In {flips - near} of these {flips} the PyTorch model is decided, by up to {max(report['flip_margins']):.2g} "
        "logits: some layers lose much, and --sensitivity shows which."
    )


def command(workspace: Workspace, parent: VariantName, label: str, step: Quantize, labels: LabelSet) -> str:
    """Returns the command line that quantises `parent` by `step`.

    Args:
        workspace: The model's workspace.
        parent: Name of the parent variant.
        label: Label of the new variant; empty for none.
        step: The quantisation.
        labels: The model's labels. If the embedded sentences have other labels and the workspace names no training
            data, the command contains the placeholder ``FILE``.
    """
    found = ["toolchain", "quantize"]
    found += ["--model", workspace.model] if workspace.model != "reference" else []
    found += ["--exported", str(workspace.exported)] if workspace.exported != Path("exported") else []
    found += ["--from", parent] if parent != "onnx-fp32" else []
    found += ["--scheme", step.scheme] if step.scheme != "dynamic" else []
    found += ["--isa", "portable"] if step.reduce_range else []
    found += ["--embeddings", step.embeddings] if step.embeddings else []
    found += ["--keep-fp32", str(step.keep_fp32)] if step.keep_fp32 else []
    for name in QUANTIZE_PASSES[step.scheme]:
        found += ["--no-pass", name] if step.passes is not None and name not in step.passes else []
    if step.trim_vocab:
        found += ["--trim-vocab", workspace.corpus.file if workspace.corpus else TRAIN]
    if uses_training_data(step):
        found += _training_options(workspace.train, labels)
    found += ["--name", label] if label and label != parent.parts.label else []
    return shlex.join(found)


def _training_options(train: TrainingSource, labels: LabelSet) -> Sequence[str]:
    """Returns the options that name the training data."""
    needed = None if inputs.embedded_fits(labels) else "FILE"
    named = {
        "--train-data": train.file or needed,
        "--text-column": train.columns.text,
        "--text-pair-column": train.columns.pair,
        "--label-column": train.columns.label if train.columns.label != USUAL.label else None,
        "--split": train.split,
    }
    return [part for option, value in named.items() if value for part in (option, value)]
