"""What an .onnx file says about itself when it lies alone: `metadata_props`, producer and doc string."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Manifest, sha256
from toolchain.artifacts.variants import step_name
from toolchain.backends.ort import EXACT_PRODUCTS
from toolchain.build.job import Built
from toolchain.errors import GraphError
from toolchain.models.checkpoints import NOT_STATED

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCER = "toolchain"
SATURATING_X86 = "x86-64 without VNNI or AMX"


def stamp(path: Path, built: Built, version: int, model: str, variant: str, parent_id: str) -> None:
    """Writes into the file at `path` what it is; its tokenizer lies beside it.

    The producer's version is the step and the step's `version`, not the release: the same work gives the same bytes.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        proto = ir.load(path)
    except (DecodeError, ValueError) as error:
        raise GraphError(f"{path} is no valid ONNX model: {error}.", "Build it again.") from error
    proto.producer_name, proto.producer_version = PRODUCER, f"{step_name(built.step)} {version}"
    proto.doc_string = f"Variant {variant} of the text classifier {model}."
    properties = {
        "labels": json.dumps(built.labels, ensure_ascii=False),
        "multi_label": json.dumps(bool(built.facts.get("multi_label"))),
        "max_length": json.dumps(built.max_length),
        "model": model,
        "variant": variant,
        "parent_id": parent_id,
        "license": license_of(built),
        "tokenizer_sha256": sha256(path.parent / "tokenizer.json"),
        "session_options": json.dumps(options_by_processor(built.facts.get("int8_headroom"))),
    }
    set_properties(proto, properties)
    ir.save(proto, path)


def set_properties(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Sets what the model says of itself, by name; what it says besides stays."""
    model.metadata_props.update({f"{PRODUCER}.{name}": value for name, value in properties.items()})


def options_by_processor(headroom: float | None) -> dict[str, dict[str, str]]:
    """The processors on which a model of this int8 `headroom` is exact only with session options of ONNX Runtime, and
    these options."""
    return {} if headroom is None or headroom >= 1 else {SATURATING_X86: dict([EXACT_PRODUCTS])}


def license_of(described: Built | Manifest) -> str:
    """The licence that the checkpoint states, in words where it states none."""
    return str(described.facts.get("license", NOT_STATED))
