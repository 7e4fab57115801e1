"""The manifest of an artifact: its description, its origin, and the digests of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from toolchain.artifacts.manifest_facts import (
    ArtifactFacts,
    Environment,
    Report,
    StoredArtifactFacts,
    StoredEnvironment,
    StoredReport,
)
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import Step, decode_step, settings_of, step_name
from toolchain.data.encoding import REQUIRED, TOKEN_TYPES
from toolchain.errors import TamperedError
from toolchain.system.decoding import Check, Count, Line, Name, Plain, decode, strict

MANIFEST = "manifest.json"
SCHEMA = 1
MAX_LENGTH = 10**6  # tokens; a larger limit of a tokenizer means that it has none
MAX_NAME_BYTES = 255  # the limit of most file systems for one part of a path


def _check_digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("this is not a sha256 in hex")
    return text


def _check_parts(path: str) -> str:
    if any(len(part.encode()) > MAX_NAME_BYTES for part in PurePosixPath(path).parts):
        raise ValueError(f"a part of the path has more than {MAX_NAME_BYTES} bytes")
    return path


Digest = Annotated[str, Check(_check_digest)]


@strict
@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path relative to the folder, its size in bytes, and its sha256 in hex."""

    path: Annotated[Line, Check(_check_parts)]
    bytes: Count
    sha256: Digest

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"the path {self.path!r} is outside the artifact's folder")
        if not parts.parts:
            raise ValueError("the path of a file is empty")


@strict
@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model: its name, its element type, and its shape with names for the dynamic axes."""

    name: Line
    dtype: Line
    shape: tuple[Count | Line, ...]


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
    name: Line
    version: Count
    settings: Annotated[dict[str, Any], Plain]  # `decode_step` checks them with the type of the step


@strict
@dataclass(frozen=True)
class _ParentRecord:
    variant: Name
    id: Digest


@strict
@dataclass(frozen=True)
class _SourceRecord:
    kind: Literal["embedded", "folder", "hub"]
    ref: Annotated[Line, Check(_check_parts)]
    revision: Line
    base: Line | None = None


@strict
@dataclass(frozen=True)
class _ManifestRecord:
    """The JSON structure of a manifest file."""

    schema: Literal[1]
    id: Digest
    model: Name
    variant: Name
    source: _SourceRecord
    step: _StepRecord
    parent: _ParentRecord | None
    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[Line, ...]
    max_length: Count
    facts: StoredArtifactFacts = field(default_factory=lambda: ArtifactFacts())
    validation: StoredReport = field(default_factory=lambda: Report())
    environment: StoredEnvironment = field(default_factory=lambda: Environment())
    created: Line = ""
    seal: Line | None = None

    def __post_init__(self) -> None:
        if not (self.files and self.inputs and self.labels):
            raise ValueError("the manifest names no files, no inputs or no labels")
        if not 0 < self.max_length <= MAX_LENGTH:
            raise ValueError(f"max_length is {self.max_length}")
        names = sorted(spec.name for spec in self.inputs)
        if names not in (sorted(REQUIRED), sorted([*REQUIRED, TOKEN_TYPES])):
            raise ValueError(f"the model takes the inputs {', '.join(names)}, which no tokenizer gives")
        counts = [spec.shape[-1] for spec in self.outputs if spec.shape and isinstance(spec.shape[-1], int)]
        if any(count != len(self.labels) for count in counts):
            raise ValueError("the outputs and the labels differ in number")
