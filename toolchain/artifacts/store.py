"""Artifacts: folders with a manifest of their files, their step and their parent, published in one rename."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from toolchain.artifacts import publishing
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.variants import Step, settings_of, step_from, step_name
from toolchain.data.labels import LabelSet
from toolchain.errors import ArtifactError, TamperedError
from toolchain.system import files

MANIFEST = "manifest.json"
ONNX = "model.onnx"  # the graph of an ONNX variant
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


@dataclass(frozen=True)
class Artifact:
    """An artifact's folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def label_set(self) -> LabelSet:
        """Returns the labels of the model's answers."""
        return LabelSet(self.manifest.labels, bool(self.manifest.facts.get("multi_label")))

    @property
    def files(self) -> tuple[str, ...]:
        """Returns the relative paths of all files, including the manifest."""
        return (*(entry.path for entry in self.manifest.files), MANIFEST)

    @property
    def onnx_path(self) -> Path:
        """Returns the path of an ONNX variant's graph."""
        return self.path / ONNX

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            TamperedError: A file is missing, differs, or is not in the manifest. The error names the first one.
        """
        for entry in self.manifest.files:
            path = self.path / entry.path
            if not path.is_file():
                what = "is missing"
            elif path.stat().st_size != entry.bytes:
                what = f"has {path.stat().st_size} bytes instead of {entry.bytes}"
            elif sha256(path) != entry.sha256:
                what = "has another sha256 than its manifest says"
            else:
                continue
            raise self._tampered(f"{entry.path} {what}")
        listed = {entry.path for entry in self.manifest.files}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            # File managers write hidden files, which do not belong to the artifact.
            if path.is_file() and name not in listed and name != MANIFEST and not path.name.startswith("."):
                raise self._tampered(f"{name} is not in its manifest")

    def _tampered(self, what: str) -> TamperedError:
        return TamperedError(
            f"{self.path}: {what}.",
            f"Delete the folder {self.path} (or move it away) and run the command again: it is built anew.",
        )


def sha256(path: Path) -> str:
    """Returns the file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Returns every file under `folder` except the manifest, sorted by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return tuple(FileEntry(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in paths)


def load(path: Path) -> Artifact | None:
    """Returns the artifact at `path`, or None if nothing exists there. It does not check the files; see `verify`.

    Raises:
        TamperedError: The manifest does not match its id.
        ArtifactError: The path exists without a readable manifest.
    """
    file = path / MANIFEST
    if not file.is_file():
        if path.exists():
            raise ArtifactError(f"{path} exists but holds no {MANIFEST}.", "It was not built here: move it away.")
        return None
    try:
        manifest = Manifest.from_json(file.read_text())
        for entry in manifest.files:
            parts = PurePosixPath(entry.path)
            if parts.is_absolute() or ".." in parts.parts:
                raise ValueError(f"the path {entry.path!r} leaves the folder")
    except TamperedError as error:
        raise TamperedError(f"{file}: {error.cause}", error.hint) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}.", f"Delete {path} and build it again.") from error
    return Artifact(path, manifest)


def copy_companions(artifact: Artifact, folder: Path) -> None:
    """Copies config and tokenizer: every file in the artifact's manifest except weights and graph."""
    for entry in artifact.manifest.files:
        if not entry.path.endswith((".safetensors", ".onnx")):
            shutil.copyfile(artifact.path / entry.path, folder / entry.path)


def publish(scratch: Path, target: Path, manifest: Manifest) -> Artifact:
    """Writes the manifest into `scratch` and renames that folder to `target`. Use it only under `publishing.lock`.

    Raises:
        ArtifactError: The operating system refuses to write there.
    """
    try:
        (scratch / MANIFEST).write_text(manifest.to_json())
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    publishing.replace(scratch, target)
    return Artifact(target, manifest)


def gzip_bytes(artifact: Artifact, cache: Path) -> int:
    """Returns the total size in bytes of the artifact's files after gzip, one by one, at the default level.

    The folder `cache` keeps the result by the artifact's id.
    """
    known = cache / artifact.manifest.id
    with suppress(OSError, ValueError):
        return int(known.read_text())
    size = 0
    for entry in artifact.manifest.files:
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        with (artifact.path / entry.path).open("rb") as file:
            while part := file.read(1 << 20):
                size += len(packer.compress(part))
        size += len(packer.flush())
    files.write_whole(known, str(size))
    return size
