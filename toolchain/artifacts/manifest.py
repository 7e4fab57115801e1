"""The manifest: what an artifact is, what it was built from, and the digests of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import Step, settings_of, step_from, step_name
from toolchain.errors import TamperedError

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path relative to the folder, its size in bytes, its sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model: its name, its element type, and its shape with names for the dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """The description of an artifact: its origin, its content and its validation.

    Attributes:
        model: Name of the model's folder.
        variant: Name of the variant.
        source: Source of the checkpoint: ``kind``, ``ref``, ``revision`` and possibly ``base``.
        parent: Name of the parent variant; None for an import.
        parent_id: `id` of the parent's manifest; None for an import.
        step: Step that built the artifact.
        step_version: Version of that step's function.
        files: All files except the manifest.
        inputs: Inputs of the model, in order.
        outputs: Outputs of the model.
        labels: Names of the labels, by index.
        max_length: Largest number of tokens of an input.
        facts: Other properties, as the step reports them.
        validation: Report of `steps.validate`.
        environment: Versions of the libraries that built it.
        created: UTC time in ISO 8601.
    """

    model: str
    variant: VariantName
    source: Mapping[str, Any]
    parent: VariantName | None
    parent_id: str | None
    step: Step
    step_version: int
    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_length: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def id(self) -> str:
        """Returns the sha256 in hex of step, step version, parent id, files, inputs, outputs, labels and `max_length`.

        It does not cover time, place and environment. So the same work gives the same id.
        """
        sealed = {
            "inputs": [dataclasses.asdict(t) for t in self.inputs],
            "outputs": [dataclasses.asdict(t) for t in self.outputs],
            "labels": self.labels,
            "max_length": self.max_length,
            "files": [dataclasses.asdict(f) for f in sorted(self.files, key=lambda f: f.path)],
            "parent": self.parent_id,
            "settings": settings_of(self.step),
            "step": step_name(self.step),
            "version": self.step_version,
        }
        return hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Returns the total size of all files except the manifest."""
        return sum(f.bytes for f in self.files)

    @property
    def tokenizer(self) -> str | None:
        """Returns the sha256 of the tokenizer, which identifies the vocabulary; None without a tokenizer."""
        return next((entry.sha256 for entry in self.files if entry.path == "tokenizer.json"), None)

    def to_json(self) -> str:
        """Returns the manifest in the form of its file."""
        body = dataclasses.asdict(self)
        body["step"] = {
            "name": step_name(self.step),
            "version": body.pop("step_version"),
            "settings": settings_of(self.step),
        }
        parent_id = body.pop("parent_id")
        body["parent"] = {"variant": self.parent, "id": parent_id} if self.parent else None
        return json.dumps({"schema": SCHEMA, "id": self.id, **body}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads the output of `to_json`.

        Raises:
            ValueError: The text is not JSON, or not a manifest. `KeyError` and `TypeError` have the same meaning.
            TamperedError: The manifest does not match its id.
            ArtifactError: This release does not know the step or its settings.
            UnknownVariantError: This release does not know the variant or its parent.
        """
        body: dict[str, Any] = json.loads(text)
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']} instead of {SCHEMA}")
        step = body.pop("step")
        parent = body.pop("parent") or {"variant": None, "id": None}
        said = body.pop("id")
        del body["schema"]
        for key, kind in (("files", FileEntry), ("inputs", TensorSpec), ("outputs", TensorSpec)):
            body[key] = tuple(_entry(kind, values) for values in body[key])
        source = body["source"]
        if set(source) - {"base"} != {"kind", "ref", "revision"} or not all(
            isinstance(v, str) for v in source.values()
        ):
            raise ValueError("its source is of another kind")
        if not (body["files"] and body["inputs"] and body["labels"] and isinstance(body["max_length"], int)):
            raise ValueError("it names no files, inputs, labels or length")
        manifest = cls(
            variant=VariantName(body.pop("variant")),
            parent=VariantName(parent["variant"]) if parent["id"] else None,
            parent_id=parent["id"],
            step_version=step["version"],
            step=step_from(step["name"], step["settings"]),
            labels=tuple(body.pop("labels")),
            **body,
        )
        if manifest.id != said:
            raise TamperedError("The manifest does not add up to its own id.", "Delete the folder and build it again.")
        return manifest


def _entry(kind: type[FileEntry] | type[TensorSpec], values: dict[str, Any]) -> FileEntry | TensorSpec:
    if "shape" in values:
        values = {**values, "shape": tuple(values["shape"])}
    return kind(**values)
