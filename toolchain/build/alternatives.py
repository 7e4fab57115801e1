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
from toolchain.data.datasets import DEFAULT_COLUMNS
from toolchain.data.inputs import TrainingSource
from toolchain.data.labels import LabelSet

# Largest margin, in logits, of an undecided answer. Up to a margin of 0.5, the second most probable label is at least
# exp(-0.5) = 61 % as probable as the first. In an undecided answer of a multi-label model, one label has a probability
# of 38 % to 62 %.
UNDECIDED_MARGIN = 0.5
UNDECIDED_SHARE = 0.8  # `is_undecided` returns true if at least 80 % of the flips are undecided answers.
# Maps a scheme that failed validation to a scheme that may have less rounding error.
ALTERNATIVE_SCHEMES = {"int4": "dynamic", "dynamic": "static"}


def count_undecided_flips(report: Mapping[str, Any]) -> int:
    """Returns the number of flips for which the PyTorch model's margin is at most `UNDECIDED_MARGIN`."""
    return sum(margin <= UNDECIDED_MARGIN for margin in report["flip_margins"])


def is_undecided(report: Mapping[str, Any]) -> bool:
    """Returns whether the PyTorch model is undecided in nearly all sentences that flip; see `count_undecided_flips`."""
    return bool(count_undecided_flips(report) >= UNDECIDED_SHARE * report["flips"])


def alternatives(
    step: Quantize, report: Mapping[str, Any], runtime_saturates: bool, same_domain: bool, layers: int | None
) -> list[Quantize]:
    """Returns the settings to try instead of `step`, most promising first; empty if there is nothing to suggest.

    The margin of a sentence says how far the PyTorch model's logits are from another predicted label. If sentences with
    a large margin flip, some layers have a large rounding error. In a sentence with a small margin, the PyTorch model
    is undecided, so even a small rounding error can change the predicted label. If nearly all flips have a small margin
    and `same_domain` is true, the first alternative to the scheme ``dynamic`` is the scheme ``static``. Otherwise, the
    first alternative to the scheme ``dynamic`` keeps more layers in fp32.

    The reference model shows why the domain (the kind of text) matters. On sentences of the training data's domain, the
    mean |Δlogit| is 0.087 with the scheme ``dynamic``, but only 0.042 with the scheme ``static``. On sentences of
    another domain, the scheme ``static`` is no better than ``dynamic``. There, the mean |Δlogit| is 0.0062 with the
    scheme ``dynamic`` and 0.0074 with the scheme ``static``.

    Args:
        step: The quantisation that failed validation.
        report: The report of `steps.validate`.
        runtime_saturates: Whether this runtime saturates 8-bit products. If the runtime saturates, weights of 7 bits
            come before all other alternatives to the scheme ``dynamic``. Weights of 7 bits avoid saturation.
        same_domain: Whether the training data has the same domain as the validation sentences.
        layers: Number of linear layers of the model; None if unknown.
    """
    if step.backend != "ort" or not (report["finite"] and (report.get("flips") or "shift" in report)):
        return []
    if step.passes is not None and "quantize-linear" not in step.passes:
        return []
    suggestions = []
    if step.scheme in ALTERNATIVE_SCHEMES:
        suggestions.append(_with_scheme(step, ALTERNATIVE_SCHEMES[step.scheme]))
    fp32_layers = 2 * (step.keep_fp32 or 1)
    if layers is None or fp32_layers < layers:
        suggestions.append(replace(step, keep_fp32=fp32_layers))
    if step.scheme == "dynamic" and not (is_undecided(report) and same_domain):
        suggestions.reverse()
    if runtime_saturates and step.scheme == "dynamic" and not step.reduce_range:
        suggestions.insert(0, replace(step, reduce_range=True))
    return suggestions


def _with_scheme(step: Quantize, scheme: str) -> Quantize:
    """Returns the step with the scheme `scheme`; the new step leaves out the same passes as `step`."""
    omitted_passes = set(QUANTIZE_PASSES[step.scheme]) - set(step.passes or QUANTIZE_PASSES[step.scheme])
    passes = tuple(name for name in QUANTIZE_PASSES[scheme] if name not in omitted_passes)
    return replace(step, scheme=scheme, reduce_range=None, passes=None if passes == QUANTIZE_PASSES[scheme] else passes)


def hint(
    workspace: Workspace,
    name: VariantName,
    step: Quantize,
    parent: Artifact,
    report: Mapping[str, Any],
    runtime_saturates: bool,
    layers: int | None,
) -> str:
    """Returns a text that explains the flips and lists the commands to try; empty if there is nothing to suggest.

    Args:
        workspace: The model's workspace.
        name: Name of the variant that failed validation.
        step: The quantisation that failed validation.
        parent: Artifact of the variant's parent.
        report: The report of `steps.validate`.
        runtime_saturates: Whether this runtime saturates 8-bit products.
        layers: Number of linear layers of the model; None if unknown.
    """
    same_domain = workspace.train.file is None and inputs.fits_embedded_data(parent.label_set)
    suggestions = alternatives(step, report, runtime_saturates, same_domain, layers)
    if name.parts.webgpu:  # a graph for WebGPU has no other scheme
        suggestions = [suggestion for suggestion in suggestions if suggestion.scheme == step.scheme]
    if not suggestions:
        return ""
    parent_name = parent.manifest.variant
    commands = [
        f"`{command(workspace, parent_name, name.parts.label, suggestion, parent.label_set)}`"
        for suggestion in suggestions
    ]
    parts = [_explain_flips(report)]
    if runtime_saturates and suggestions[0].reduce_range:
        parts.append("This runtime saturates 8-bit products. Weights of 7 bits avoid saturation.")
    return " ".join([*parts, f"Try {', then '.join(commands)}."])


def _explain_flips(report: Mapping[str, Any]) -> str:
    """Returns a text that explains the margins of the flipped sentences."""
    if "shift" in report:
        return "Some layers have a large rounding error; --sensitivity shows which."
    flips, undecided = report["flips"], count_undecided_flips(report)
    kind = "words" if "words" in report else "sentences"
    if is_undecided(report):
        return (
            f"In {undecided} of the {flips} flipped {kind} the PyTorch model itself is undecided: a change of "
            f"{UNDECIDED_MARGIN:g} in a logit changes its answer. A smaller rounding error flips fewer {kind}. "
            "Longer training or more training rows give the model larger margins."
        )
    return (
        f"In {flips - undecided} of the {flips} flipped {kind} the PyTorch model is decided: its margin is up to "
        f"{max(report['flip_margins']):.2g} logits. Some layers have a large rounding error; --sensitivity shows which."
    )


def command(workspace: Workspace, parent: VariantName, label: str, step: Quantize, labels: LabelSet) -> str:
    """Returns the command line that quantises `parent` with `step`.

    Args:
        workspace: The model's workspace.
        parent: Name of the parent variant.
        label: Label of the new variant; empty for none.
        step: The quantisation.
        labels: The model's labels. If the embedded SST-2 does not fit the model's labels and the workspace names no
            training data, the command contains the placeholder ``FILE``.
    """
    arguments = ["toolchain", "quantize"]
    arguments += ["--model", workspace.model] if workspace.model != "reference" else []
    arguments += ["--exported", str(workspace.exported)] if workspace.exported != Path("exported") else []
    arguments += ["--from", parent] if parent != "onnx-fp32" else []
    arguments += ["--scheme", step.scheme] if step.scheme != "dynamic" else []
    arguments += ["--isa", "portable"] if step.reduce_range else []
    arguments += ["--embeddings", step.embeddings] if step.embeddings else []
    arguments += ["--keep-fp32", str(step.keep_fp32)] if step.keep_fp32 else []
    for name in QUANTIZE_PASSES[step.scheme]:
        arguments += ["--no-pass", name] if step.passes is not None and name not in step.passes else []
    if step.trim_vocab:
        arguments += ["--trim-vocab", workspace.corpus.file if workspace.corpus else TRAIN]
    if uses_training_data(step):
        arguments += _training_options(workspace.train, labels)
    arguments += ["--name", label] if label and label != parent.parts.label else []
    return shlex.join(arguments)


def _training_options(train: TrainingSource, labels: LabelSet) -> Sequence[str]:
    """Returns the options that name the training data."""
    placeholder = None if inputs.fits_embedded_data(labels) else "FILE"
    values_by_option = {
        "--train-data": train.file or placeholder,
        "--text-column": train.columns.text,
        "--text-pair-column": train.columns.pair,
        "--label-column": train.columns.label if train.columns.label != DEFAULT_COLUMNS.label else None,
        "--split": train.split,
    }
    return [part for option, value in values_by_option.items() if value for part in (option, value)]
