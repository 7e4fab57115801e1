"""An artifact: a folder whose manifest says what is in it and how it came about, sealed once and published whole."""

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
from toolchain.artifacts.variants import Step, settings_of, step_from, step_name
from toolchain.data.labels import LabelSet
from toolchain.errors import ArtifactError, TamperedError
from toolchain.system import files

MANIFEST = "manifest.json"
ONNX = "model.onnx"  # the graph of an ONNX variant
SCHEMA = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to the folder, bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, element type, shape with names for the dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is. `id` covers what was done (step, its version, parent) and what came of it (files, inputs,
    outputs, labels); time, place and environment stay outside, so that the same work gives the same id."""

    model: str
    variant: str
    source: Mapping[str, Any]
    parent: str | None
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
        """sha256 over the canonical JSON of what is sealed."""
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
        """Every file that ships; the manifest itself is not counted."""
        return sum(f.bytes for f in self.files)

    @property
    def tokenizer(self) -> str | None:
        """sha256 of its tokenizer, which tells one vocabulary from another; None where there is none."""
        return next((entry.sha256 for entry in self.files if entry.path == "tokenizer.json"), None)

    def to_json(self) -> str:
        """The manifest as it is stored."""
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
        """Reads `to_json`; `ValueError` or `KeyError` for a text that is none, `TamperedError` where the id lies."""
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
            parent=parent["variant"],
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
    """A published folder and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def label_set(self) -> LabelSet:
        """What it answers with."""
        return LabelSet(self.manifest.labels, bool(self.manifest.facts.get("multi_label")))

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of all it consists of, the manifest among them."""
        return (*(entry.path for entry in self.manifest.files), MANIFEST)

    @property
    def onnx_path(self) -> Path:
        """Where the graph of an ONNX variant lies."""
        return self.path / ONNX

    def verify(self) -> None:
        """Compares every file with the manifest; `TamperedError` names the first that differs or is not listed."""
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
            # Hidden files are the file manager's, not the artifact's.
            if path.is_file() and name not in listed and name != MANIFEST and not path.name.startswith("."):
                raise self._tampered(f"{name} is not in its manifest")

    def _tampered(self, what: str) -> TamperedError:
        return TamperedError(
            f"{self.path}: {what}.",
            f"Delete the folder {self.path} (or move it away) and run the command again: it is built anew.",
        )


def sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file under `folder` but the manifest, sorted by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return tuple(FileEntry(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in paths)


def load(path: Path) -> Artifact | None:
    """The artifact at `path`, None where there is none; `ArtifactError` for a folder that is something else."""
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
        raise TamperedError(f"{file}: {error.cause}", error.mend) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}.", f"Delete {path} and build it again.") from error
    return Artifact(path, manifest)


def copy_companions(artifact: Artifact, folder: Path) -> None:
    """Copies config and tokenizer: every file of the artifact's manifest but weights and graph."""
    for entry in artifact.manifest.files:
        if not entry.path.endswith((".safetensors", ".onnx")):
            shutil.copyfile(artifact.path / entry.path, folder / entry.path)


def publish(scratch: Path, target: Path, manifest: Manifest) -> Artifact:
    """Writes the manifest last and renames the whole folder into place; under `publishing.lock`."""
    try:
        (scratch / MANIFEST).write_text(manifest.to_json())
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    publishing.replace(scratch, target)
    return Artifact(target, manifest)


def gzip_bytes(artifact: Artifact, cache: Path) -> int:
    """The bytes of all its files, each compressed by gzip at its default level; remembered by id in `cache`."""
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
