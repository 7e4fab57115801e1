"""Finds the input files of a large prediction: files, folders, patterns and URLs, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.data import folders, storage
from toolchain.data.tables import COMPRESSIONS, FORMATS, kind_of
from toolchain.errors import DataError
from toolchain.system.decoding import check_line

MAX_INPUT_FILES = 100_000
_KINDS = f"{', '.join(FORMATS)}; all except .parquet also with {', '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class InputFile:
    """An input file.

    Attributes:
        name: Name of the file for messages and records; the URL of a file without its secrets.
        size: Number of bytes.
        version: Text that changes with the content of the file: its time of change, or a tag that the storage computed.
        path: Absolute path of the file in its file system.
        url: A URL that opens the file system of a file behind a URL, and may contain secrets; None for a local file.
    """

    name: str
    size: int
    version: str
    path: str
    url: str | None = None

    def require_unchanged(self) -> None:
        """Raises `DataError` if a local file has changed since `find_input_files` found it."""
        if self.url:
            return
        now = _local_file(self.path)
        if (now.size, now.version) != (self.size, self.version):
            raise DataError(
                f"{self.name} changed while it was read.",
                "Wait until no program writes the file, then choose another output folder.",
            )


def find_input_files(inputs: Sequence[str]) -> list[InputFile]:
    """Returns all input files: the inputs in order, and the files of each folder or pattern sorted by name.

    In a folder, the function ignores files and folders whose name begins with ``.`` or ``_``, and files with other
    endings than those of data.

    Args:
        inputs: Files, folders, patterns such as ``data/*.csv``, and URLs of these.

    Raises:
        DataError: An input does not exist or has no data, a file is named twice, a link leads out of its folder, there
            are more than `MAX_INPUT_FILES` files, or a URL cannot be read.
    """
    files: list[InputFile] = []
    names = set[str]()
    for location in inputs:
        if location == "-":
            raise DataError("Standard input cannot be read again after an interruption.", "Save the texts in a file.")
        listing = _list_url(location) if storage.is_url(location) else _list_local(storage.local_name(location))
        for file in listing:
            if file.path in names:
                raise DataError(f"{file.name} is named twice.", "Name each file once.")
            if len(files) == MAX_INPUT_FILES:
                raise DataError(f"There are more than {MAX_INPUT_FILES:,} input files.", "Score them in several runs.")
            _check_name(file.name)
            names.add(file.path)
            files.append(file)
    return files


def _check_name(name: str) -> None:
    if kind_of(name) == ".parquet" and Path(name.lower()).suffix != ".parquet":
        raise DataError(f"{name} is a compressed Parquet file.", "Decompress the file.")
    try:
        check_line(name)
    except ValueError as error:
        raise DataError(f"The name {name!r} cannot be used: {error}.", "Rename the file.") from error


def _list_local(name: str) -> Iterator[InputFile]:
    if glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(path for path in glob.iglob(name, recursive=True) if Path(path).is_file())
        if not matches:
            raise DataError(f"No file matches {name}.", "Correct the pattern, and quote it for the shell.")
        yield from map(_local_file, matches)
    elif Path(name).is_dir():
        yield from map(_local_file, _files_of_folder(Path(name)))
    else:
        yield _local_file(name)


def _files_of_folder(folder: Path) -> list[str]:
    if (folder / folders.STATE).exists() or (folder / folders.SPLITS).exists():
        return [str(path) for path in folders.list_files(folder)]
    found: list[str] = []
    for place, subfolders, names in os.walk(folder, onerror=_raise_walk_error):
        subfolders[:] = [name for name in subfolders if _is_visible(name)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if _is_data(name)]
        if len(found) > MAX_INPUT_FILES:
            raise DataError(f"{folder} has more than {MAX_INPUT_FILES:,} files.", "Score them in several runs.")
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


def _list_url(url: str) -> Iterator[InputFile]:
    system, path = storage.open_file_system(url)
    with storage.convert_storage_errors(url):
        if "*" in path:
            found = system.glob(path, detail=True)
            if not found:
                raise DataError(f"No file matches {storage.public_name(url)}.", "Correct the pattern.")
        elif system.isdir(path):
            start = len(path.rstrip("/"))
            found = {
                name: facts
                for name, facts in system.find(path, detail=True).items()
                if all(map(_is_visible, name[start:].strip("/").split("/"))) and kind_of(name) in FORMATS
            }
            if not found:
                raise _empty_folder_error(storage.public_name(url))
        else:
            yield _remote_file(url, path, system.info(path), storage.public_name(url))
            return
        for name in sorted(found):
            if found[name]["type"] == "file":
                public_name = storage.public_name(system.unstrip_protocol(name))
                yield _remote_file(url, name, found[name], public_name)


def _remote_file(url: str, path: str, facts: Mapping[str, Any], name: str) -> InputFile:
    return InputFile(name, int(facts["size"] or 0), storage.version_of(facts), path, url)


def _local_file(path: str) -> InputFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Pass a readable file.") from error
    return InputFile(path, status.st_size, str(status.st_mtime_ns), os.path.abspath(path))
