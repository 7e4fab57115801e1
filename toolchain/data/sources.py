"""Finds the input files of a large prediction: files, folders, patterns and URLs, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.data import folders, storage
from toolchain.data.compression import ENDINGS, strip_ending
from toolchain.data.tables import FORMATS, kind_of
from toolchain.errors import DataError

MAX_PARTS = 100_000
_KINDS = f"{', '.join(FORMATS)}; all except .parquet also with {', '.join(ENDINGS)}"


@dataclass(frozen=True)
class Part:
    """An input file.

    Attributes:
        location: Path or URL that opens the file. A URL may contain a password, so it is never shown or stored.
        size: Number of bytes.
        version: Text that changes with the content of the file: its time of change, or a tag that the storage computed.
    """

    location: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """Returns the name of the file for messages and records."""
        return storage.public_name(self.location)

    @property
    def kind(self) -> str:
        """Returns the ending that states the format, such as ``.csv`` for ``a.csv.gz``."""
        return kind_of(self.name)

    def require_unchanged(self) -> None:
        """Raises `DataError` if the local file or the file behind the URL has changed since `find_parts` found it."""
        if _part(self.location) != self:
            raise DataError(
                f"{self.name} changed while it was read.",
                "Wait until no program writes the file, then choose another output folder.",
            )


def find_parts(inputs: Sequence[str]) -> list[Part]:
    """Returns all input files: the inputs in order, and the files of each folder or pattern sorted by name.

    In a folder, the function ignores files and folders whose name begins with ``.`` or ``_``, and files with other
    endings than those of data.

    Args:
        inputs: Files, folders, patterns such as ``data/*.csv``, and URLs of these.

    Raises:
        DataError: An input does not exist or has no data, a file is named twice, a link leads out of its folder, there
            are more than `MAX_PARTS` files, or a URL cannot be read.
    """
    parts: list[Part] = []
    names = set[str]()
    for location in inputs:
        if location == "-":
            raise DataError("Standard input cannot be read again after an interruption.", "Save the texts in a file.")
        listing = _list_url(location) if storage.is_url(location) else _list_local(storage.local_name(location))
        for part in listing:
            if part.location in names:
                raise DataError(f"{part.name} is named twice.", "Name each file once.")
            if part.kind == ".parquet" and strip_ending(part.name) != part.name:
                raise DataError(f"{part.name} is a compressed Parquet file.", "Decompress the file.")
            if len(parts) == MAX_PARTS:
                raise DataError(f"There are more than {MAX_PARTS:,} input files.", "Score them in several runs.")
            names.add(part.location)
            parts.append(part)
    return parts


def _list_local(name: str) -> Iterator[Part]:
    if glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(path for path in glob.iglob(name, recursive=True) if Path(path).is_file())
        if not matches:
            raise DataError(f"No file matches {name}.", "Correct the pattern, and quote it for the shell.")
        yield from map(_part, matches)
    elif Path(name).is_dir():
        yield from map(_part, _files_of_folder(Path(name)))
    else:
        yield _part(name)


def _files_of_folder(folder: Path) -> list[str]:
    if (folder / folders.STATE).exists() or (folder / folders.SPLITS).exists():
        return [str(path) for path in folders.list_files(folder)]
    found: list[str] = []
    for place, subfolders, names in os.walk(folder, onerror=_raise_walk_error):
        subfolders[:] = [name for name in subfolders if _is_visible(name)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if _is_data(name)]
        if len(found) > MAX_PARTS:
            raise DataError(f"{folder} has more than {MAX_PARTS:,} files.", "Score them in several runs.")
    if not found:
        raise _empty_folder_error(str(folder))
    return [str(folders.inside(folder, name)) for name in sorted(found)]


def _raise_walk_error(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.", "Pass a readable folder.") from error


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "_"))


def _is_data(name: str) -> bool:
    return _is_visible(name) and kind_of(name) in FORMATS


def _empty_folder_error(folder: str) -> DataError:
    return DataError(f"{folder} has no file with data.", f"The names of such files end in {_KINDS}.")


def _list_url(url: str) -> Iterator[Part]:
    file_system, path = storage.open_file_system(url)
    with storage.convert_storage_errors(url):
        if "*" in path:
            found = file_system.glob(path, detail=True)
            if not found:
                raise DataError(f"No file matches {storage.public_name(url)}.", "Correct the pattern.")
        elif file_system.isdir(path):
            everything = file_system.find(path, detail=True)
            root = path.rstrip("/")
            found = {
                name: facts
                for name, facts in everything.items()
                if all(map(_is_visible, Path(os.path.relpath(name, root)).parts)) and _is_data(Path(name).name)
            }
            if not found:
                raise _empty_folder_error(storage.public_name(url))
        else:
            yield _part(url)
            return
        for name in sorted(found):
            if found[name]["type"] == "file":
                location = file_system.unstrip_protocol(name)
                yield Part(location, int(found[name]["size"] or 0), storage.version_of(found[name]))


def _part(location: str) -> Part:
    if storage.is_url(location):
        file_system, path = storage.open_file_system(location)
        with storage.convert_storage_errors(location):
            facts = file_system.info(path)
            return Part(location, int(facts["size"] or 0), storage.version_of(facts))
    try:
        status = os.stat(location)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error.strerror}.", "Pass a readable file.") from error
    return Part(location, status.st_size, str(status.st_mtime_ns))
