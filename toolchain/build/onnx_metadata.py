"""Metadata inside an .onnx file (`metadata_props`, producer, doc string), for users without the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import step_name
from toolchain.artifacts.store import sha256
from toolchain.backends.ort import EXACT_PRODUCTS
from toolchain.build.job import StepResult
from toolchain.data.labels import MULTI, task_of_facts
from toolchain.errors import GraphError
from toolchain.models.checkpoints import NOT_STATED

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCER = "toolchain"
SATURATING_X86 = "x86-64 without VNNI or AMX"


def write_metadata(path: Path, result: StepResult, version: int, model: str, variant: str, parent_id: str) -> None:
    """Writes metadata into an ONNX file.

    The producer version is the step's name and `version`, not the release of this project. Two releases of this project
    that build the variant in the same way write the same bytes.

    Args:
        path: The ONNX file, with its tokenizer.json in the same folder.
        result: Result of the step.
        version: Version of the function that runs the step.
        model: Name of the model's folder.
        variant: Name of the variant.
        parent_id: `Manifest.id` of the parent.

    Raises:
        GraphError: The file is no valid ONNX model.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        proto = ir.load(path)
    except (DecodeError, ValueError) as error:
        raise GraphError(f"{path} is not a valid ONNX model: {error}.", "Build the variant again.") from error
    proto.producer_name, proto.producer_version = PRODUCER, f"{step_name(result.step)} {version}"
    proto.doc_string = f"Variant {variant} of the text classifier {model}."
    properties = {
        "labels": json.dumps(result.labels, ensure_ascii=False),
        "multi_label": json.dumps(task_of_facts(result.facts) == MULTI),
        **({"task": result.facts["task"]} if "task" in result.facts else {}),
        "max_length": json.dumps(result.max_length),
        "model": model,
        "variant": variant,
        "parent_id": parent_id,
        "license": license_of(result),
        "tokenizer_sha256": sha256(path.parent / "tokenizer.json"),
        "session_options": json.dumps(options_by_processor(result.facts.get("int8_headroom"))),
    }
    set_properties(proto, properties)
    ir.save(proto, path)


def set_properties(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Sets entries of `metadata_props`, each with the prefix ``toolchain.``; keeps all other entries."""
    model.metadata_props.update({f"{PRODUCER}.{name}": value for name, value in properties.items()})


def options_by_processor(headroom: float | None) -> dict[str, dict[str, str]]:
    """Returns the ONNX Runtime session options that an int8 model needs to be exact, by kind of processor.

    Args:
        headroom: Headroom of the model, as `quantize_linear.headroom` returns it: the largest signed 16-bit
            integer divided by the largest possible sum of two int8 products. None if the model has no int8 product.

    Returns:
        Option names and values by kind of processor; empty if the model is exact on every processor.
    """
    return {} if headroom is None or headroom >= 1 else {SATURATING_X86: dict([EXACT_PRODUCTS])}


def license_of(description: StepResult | Manifest) -> str:
    """Returns the licence that the checkpoint states, or ``not stated``."""
    return str(description.facts.get("license", NOT_STATED))
