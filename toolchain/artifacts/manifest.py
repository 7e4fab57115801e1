"""The manifest of an artifact: its description, its origin, and the digests of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import Step, decode_step, settings_of, step_name
from toolchain.errors import TamperedError
from toolchain.system.decoding import decode, strict

MANIFEST = "manifest.json"
SCHEMA = 1


@strict
@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path relative to the folder, its size in bytes, and its sha256 in hex."""

    path: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"the path {self.path!r} is outside the artifact's folder")


@strict
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
        source: Source of the checkpoint, with the keys ``kind``, ``ref``, ``revision`` and possibly ``base``.
        parent: Name of the parent variant; None for an import.
        parent_id: `id` of the parent's manifest; None for an import.
        step: Step that built the artifact.
        step_version: Version of the function that runs the step.
        files: All files except the manifest.
        inputs: Inputs of the model, in order.
        outputs: Outputs of the model.
        labels: Names of the labels, by index.
        max_length: Maximum number of tokens of an input text.
        facts: Properties of the model, such as its number of parameters, as the step reports them.
        validation: Report of the validation, from `validate` in `toolchain/build/steps/`.
        environment: Versions of the libraries that built the artifact.
        created: UTC time of the build, in ISO 8601.
        sealed: Whether the manifest file has a seal. Manifests of older releases have none.
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
    sealed: bool = True

    @property
    def id(self) -> str:
        """Returns the sha256 in hex of step, step version, parent id, files, inputs, outputs, labels and `max_length`.

        The id does not depend on the build time, the environment, the facts or the validation. Two builds with the same
        step, parent and files have the same id, even if they ran on different machines.
        """
        content = {
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
        return _digest(content)

    @property
    def size_bytes(self) -> int:
        """Returns the total size of all files except the manifest."""
        return sum(f.bytes for f in self.files)

    @property
    def tokenizer(self) -> str | None:
        """Returns the sha256 of the tokenizer, which identifies the vocabulary; None without a tokenizer."""
        return next((entry.sha256 for entry in self.files if entry.path == "tokenizer.json"), None)

    def to_json(self) -> str:
        """Returns the JSON text of the manifest file, with the seal as its last entry.

        The seal is the sha256 in hex of all other entries. The id covers only the entries that determine the artifact's
        content, so that the same build has the same id on every machine.
        """
        body = dataclasses.asdict(self)
        del body["sealed"]
        body["step"] = {
            "name": step_name(self.step),
            "version": body.pop("step_version"),
            "settings": settings_of(self.step),
        }
        parent_id = body.pop("parent_id")
        body["parent"] = {"variant": self.parent, "id": parent_id} if self.parent else None
        content = {"schema": SCHEMA, "id": self.id, **body}
        return json.dumps({**content, "seal": _seal_of(json.dumps(content))}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Returns the manifest that `to_json` wrote as `text`.

        Raises:
            ValueError: The text is not JSON, or not a manifest.
            TamperedError: The manifest does not match its id or its seal.
            ArtifactError: This release does not know the step or its settings.
            UnknownVariantError: This release does not know the variant or its parent.
        """
        record = decode(_ManifestRecord, text)
        manifest = cls(
            model=record.model,
            variant=VariantName(record.variant),
            source={key: value for key, value in dataclasses.asdict(record.source).items() if value is not None},
            parent=VariantName(record.parent.variant) if record.parent else None,
            parent_id=record.parent.id if record.parent else None,
            step=decode_step(record.step.name, record.step.settings),
            step_version=record.step.version,
            files=record.files,
            inputs=record.inputs,
            outputs=record.outputs,
            labels=record.labels,
            max_length=record.max_length,
            facts=record.facts,
            validation=record.validation,
            environment=record.environment,
            created=record.created,
            sealed=record.seal is not None,
        )
        for name, recorded, actual in (("id", record.id, manifest.id), ("seal", record.seal, _seal_of(text))):
            if recorded not in (None, actual):
                raise TamperedError(
                    f"The manifest does not match its own {name}.", "Delete the folder and build the artifact again."
                )
        return manifest


def _seal_of(text: str) -> str:
    """Returns the seal of a manifest with this JSON text; ignores a seal in the text."""
    return _digest({key: value for key, value in json.loads(text).items() if key != "seal"})


def _digest(content: Mapping[str, Any]) -> str:
    """Returns the sha256 in hex of the content as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@strict
@dataclass(frozen=True)
class _StepRecord:
    name: str
    version: int
    settings: dict[str, Any]


@strict
@dataclass(frozen=True)
class _ParentRecord:
    variant: str
    id: str


@strict
@dataclass(frozen=True)
class _SourceRecord:
    kind: str
    ref: str
    revision: str
    base: str | None = None


@strict
@dataclass(frozen=True)
class _ManifestRecord:
    """The JSON structure of a manifest file."""

    schema: Literal[1]
    id: str
    model: str
    variant: str
    source: _SourceRecord
    step: _StepRecord
    parent: _ParentRecord | None
    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_length: int
    facts: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    seal: str | None = None

    def __post_init__(self) -> None:
        if not (self.files and self.inputs and self.labels):
            raise ValueError("the manifest names no files, no inputs or no labels")
