"""What an .onnx file says about itself when it lies alone: `metadata_props`, producer and doc string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts import Manifest, sha256
from toolchain.checkpoints import NOT_STATED
from toolchain.jobs import Built
from toolchain.variants import step_name

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCER = "toolchain"
LICENSE = f"{PRODUCER}.license"
# With this session option ONNX Runtime does not saturate int8 products on x86 without VNNI.
EXACT_SESSION = {"session.x64quantprecision": "1"}


def stamp(path: Path, built: Built, version: int, model: str, variant: str, parent_id: str) -> None:
    """Writes into the file at `path` what it is; its tokenizer lies beside it.

    The producer's version is the step and the step's `version`, not the release: the same work gives the same bytes.
    """
    import onnx_ir as ir

    proto = ir.load(path)
    proto.producer_name, proto.producer_version = PRODUCER, f"{step_name(built.step)} {version}"
    proto.doc_string = f"Variant {variant} of the text classifier {model}."
    room = built.facts.get("int8_headroom")
    properties = {
        "labels": json.dumps(built.labels, ensure_ascii=False),
        "multi_label": json.dumps(bool(built.facts.get("multi_label"))),
        "max_length": json.dumps(built.max_length),
        "model": model,
        "variant": variant,
        "parent_id": parent_id,
        "license": license_of(built),
        "tokenizer_sha256": sha256(path.parent / "tokenizer.json"),
        "session_options": json.dumps(EXACT_SESSION if room is not None and room < 1 else {}),
    }
    proto.metadata_props.update({f"{PRODUCER}.{name}": value for name, value in properties.items()})
    ir.save(proto, path)


def license_of(described: Built | Manifest) -> str:
    """The licence that the checkpoint states, in words where it states none."""
    return str(described.facts.get("license", NOT_STATED))


def set_license(model: ir.Model, license_: str) -> None:
    """States another licence in a file that `stamp` wrote."""
    model.metadata_props[LICENSE] = license_
