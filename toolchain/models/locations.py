"""The source of a checkpoint, and the record of a checkpoint's folder on this machine.

A manifest has only the name of a checkpoint's folder, because other machines may read the manifest. The hidden file
`LOCATION` in the model's folder under `exported` has the path of the checkpoint's folder on this machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.system import files
from toolchain.system.decoding import Line, decode, read_bytes, strict

LOCATION = ".location.json"
# A manifest writes the base of an adapter as this prefix and the folder's name. A hub id cannot begin with this prefix.
FOLDER_PREFIX = "./"


@dataclass(frozen=True)
class Source:
    """The source of a checkpoint.

    Attributes:
        kind: Kind of the source: ``embedded``, ``folder`` or ``hub``.
        ref: Absolute path of the folder, or the hub id. If this machine has no record of the folder, only its name.
        revision: Exact revision, in the format of `Import.revision`.
        base: Base of an adapter as the user named it, in the form that `locate` accepts. If `base` is empty, the
            adapter's settings name the base.
    """

    kind: str
    ref: str
    revision: str | None = None
    base: str = ""

    def same_origin(self, other: Source) -> bool:
        """Returns whether both sources have the same kind and the same folder or hub id; ignores revision and base.

        If this machine has no record of a folder's path, the function compares the names of the folders.
        """
        if self.kind != other.kind:
            return False
        if self.kind == "folder" and not (Path(self.ref).is_absolute() and Path(other.ref).is_absolute()):
            return Path(self.ref).name == Path(other.ref).name
        return self.ref == other.ref

    def to_manifest(self) -> dict[str, Any]:
        """Returns the source as a manifest stores it: names instead of paths, and without an empty `base`."""
        source = replace(self, ref=Path(self.ref).name) if self.kind == "folder" else self
        if Path(source.base).is_absolute():
            source = replace(source, base=FOLDER_PREFIX + Path(source.base).name)
        return {key: value for key, value in asdict(source).items() if key != "base" or value}


@strict
@dataclass(frozen=True)
class _Location:
    ref: Line
    base: Line


def record(folder: Path, source: Source) -> None:
    """Records the paths of the source in the model's folder, unless the source has none, or the disk refuses it.

    Without the record, a later command names the folder again.
    """
    if not Path(source.ref).is_absolute() and not Path(source.base).is_absolute():
        return
    content = json.dumps({"ref": source.ref, "base": source.base})
    path = folder / LOCATION
    if not path.is_file() or path.read_bytes() != content.encode():
        files.write_cache(path, content)


def read(folder: Path, source: Source) -> Source:
    """Returns the source of a manifest with the paths that this machine recorded in the model's folder.

    Without a readable record that matches the source, the source has only the names of its folders. A path in the
    manifest itself counts only by its name, because another machine may have written the manifest.
    """
    source = Source(**source.to_manifest())
    try:
        location = decode(_Location, read_bytes(folder / LOCATION))
    except (OSError, ValueError):
        return source
    located = replace(source, ref=location.ref, base=location.base)
    return located if located.to_manifest() == source.to_manifest() else source
