"""Artifacts: folders with a manifest of their files, their step and their parent, published in one rename."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts import publishing
from toolchain.artifacts.manifest import MANIFEST, FileEntry, Manifest
from toolchain.data.labels import LabelSet, task_of_facts
from toolchain.errors import ArtifactError, TamperedError, UnknownVariantError
from toolchain.system import files
from toolchain.system.decoding import read_bytes

ONNX = "model.onnx"  # file name of the graph in the folder of an ONNX variant


@dataclass(frozen=True, repr=False)
class Artifact:
    """An artifact: the folder of a built variant, and its manifest.

    Attributes:
        path: The folder.
        manifest: The manifest.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        """Returns one line with the artifact's name, size and folder."""
        return f"<Artifact {self.name}, {self.size_bytes / 1e6:.1f} MB, in {self.path}>"

    @property
    def name(self) -> str:
        """Returns the name of the variant."""
        return str(self.manifest.variant)

    @property
    def id(self) -> str:
        """Returns the id, which depends on content and settings, and not on the time or the machine."""
        return self.manifest.id

    @property
    def size_bytes(self) -> int:
        """Returns the size of all files except the manifest, in bytes."""
        return self.manifest.size_bytes

    @property
    def label_set(self) -> LabelSet:
        """Returns the labels and the task of the model."""
        return LabelSet(self.manifest.labels, task_of_facts(self.manifest.facts))

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
            TamperedError: A file is missing, has other content than the manifest records, or is not in the manifest;
                the error names the first such file.
        """
        for entry in self.manifest.files:
            path = self.path / entry.path
            if not path.is_file():
                fault = "is missing"
            elif path.stat().st_size != entry.bytes:
                fault = f"has {path.stat().st_size} bytes instead of {entry.bytes}"
            elif sha256(path) != entry.sha256:
                fault = "does not have the sha256 that the manifest records"
            else:
                continue
            raise self._tampered_error(f"{entry.path} {fault}")
        recorded_paths = {entry.path for entry in self.manifest.files}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            # File managers write hidden files, which do not belong to the artifact.
            if not path.is_dir() and name not in recorded_paths and name != MANIFEST and not path.name.startswith("."):
                raise self._tampered_error(f"{name} is not in the manifest")

    def _tampered_error(self, fault: str) -> TamperedError:
        return TamperedError(
            f"{self.path}: {fault}.",
            f"Delete the folder {self.path} or move it away. Then run the command again to rebuild the artifact.",
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
    """Returns the artifact at `path`, or None if nothing exists there.

    The function does not check the files; see `Artifact.verify`.

    Raises:
        TamperedError: The manifest does not match its id.
        ArtifactError: The path exists, but has no readable manifest.
    """
    file = path / MANIFEST
    if not file.is_file():
        if path.exists():
            raise ArtifactError(f"{path} exists but has no {MANIFEST}.", "Move the folder away; it is not an artifact.")
        return None
    try:
        manifest = Manifest.from_json(read_bytes(file).decode())
    except TamperedError as error:
        raise TamperedError(f"{file}: {error.cause}", error.hint) from error
    except (ValueError, UnknownVariantError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read: {error}.", f"Delete the folder {path} and build the artifact again."
        ) from error
    return Artifact(path, manifest)


def copy_companions(artifact: Artifact, folder: Path) -> None:
    """Copies the artifact's config and tokenizer to `folder`: every file in the manifest except weights and graph."""
    for entry in artifact.manifest.files:
        if not entry.path.endswith((".safetensors", ".onnx")):
            shutil.copyfile(artifact.path / entry.path, folder / entry.path)


def publish(scratch: Path, target: Path, manifest: Manifest) -> Artifact:
    """Writes the manifest into `scratch` and renames that folder to `target`.

    Call this function only under `publishing.lock`.

    Raises:
        ArtifactError: The operating system refuses to write the manifest or to rename the folder.
    """
    try:
        (scratch / MANIFEST).write_text(manifest.to_json())
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    publishing.replace(scratch, target)
    return Artifact(target, manifest)


def current_ids(exported: Path, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Maps each (model, variant) to the id of its current artifact; omits variants without a readable artifact.

    Args:
        exported: The folder with the folders of all models, such as ``exported/``.
        names: Pairs of model name and variant name.
    """
    ids = {}
    for model, variant in names:
        with suppress(ArtifactError):
            if artifact := load(exported / model / variant):
                ids[model, variant] = artifact.manifest.id
    return ids


def gzip_bytes(artifact: Artifact, cache: Path) -> int:
    """Returns the total size in bytes of the artifact's files, each compressed alone by gzip at its default level.

    The folder `cache` stores the result under the artifact's id.
    """
    cache_file = cache / artifact.manifest.id
    with suppress(OSError, ValueError):
        return int(cache_file.read_text())
    size = 0
    for entry in artifact.manifest.files:
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        with (artifact.path / entry.path).open("rb") as file:
            while chunk := file.read(1 << 20):
                size += len(packer.compress(chunk))
        size += len(packer.flush())
    files.write_cache(cache_file, str(size))
    return size
