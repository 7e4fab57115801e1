"""Finds the files of a data folder: Parquet files, or a data set that `save_to_disk` of the library datasets wrote.

Another program wrote the folder, so its JSON files are decoded with bounds, and a name in them leads to no file outside
of the folder.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Annotated, NotRequired, TypeVar

from typing_extensions import TypedDict

from toolchain.errors import DataError
from toolchain.system.decoding import Check, Name, decode, partial, read_bytes

MAX_FILES = 10_000
STATE, SPLITS = "state.json", "dataset_dict.json"
_SAVE_HINT = "Save the data set again with datasets.Dataset.save_to_disk."
T = TypeVar("T")


def _check_files(items: list[T]) -> list[T]:
    if not 0 < len(items) <= MAX_FILES:
        raise ValueError(f"the list is empty, or has more than {MAX_FILES:,} items")
    return items


def _check_no_indices(items: list[object] | None) -> None:
    if items:
        raise ValueError("the data set is a selection of rows, which this version of the library datasets saves apart")


@partial
class _DataFile(TypedDict):
    filename: Name


@partial
class _State(TypedDict):
    _data_files: Annotated[list[_DataFile], Check(_check_files)]
    _indices_data_files: NotRequired[Annotated[list[object] | None, Check(_check_no_indices)]]


@partial
class _Splits(TypedDict):
    splits: Annotated[list[Name], Check(_check_files)]


def choose_split(folder: Path, split: str | None, default_split: str) -> Path:
    """Returns the folder of one split of a data folder; the data folder itself if it has no splits.

    Args:
        folder: The data folder.
        split: Name of the split; None for `default_split`.
        default_split: The split if `split` is None.

    Raises:
        DataError: The folder has other splits, or `split` is set and the folder has no splits.
    """
    if not (folder / SPLITS).exists():
        if split:
            raise DataError(
                f"{folder} is a folder without splits, so it has no split {split!r}.",
                "Leave --split out, or use --split held-out.",
            )
        return folder
    splits = _read_splits(folder)
    name = split or default_split
    if name not in splits:
        raise DataError(
            f"{folder} has no split {name!r}. Its splits: {', '.join(splits)}.", "Choose a split with --split."
        )
    return inside(folder, name)


def list_files(folder: Path) -> list[Path]:
    """Returns the files of a data folder without splits, in the order of their rows.

    Raises:
        DataError: The folder has no data, has splits, has more than `MAX_FILES` entries, or names a file outside of the
            folder.
    """
    if (folder / SPLITS).exists():
        splits = _read_splits(folder)
        raise DataError(
            f"{folder} has the splits {', '.join(splits)}.",
            f"Name the folder of one split: {folder / splits[0]}.",
        )
    if (folder / STATE).exists():
        names = [entry["filename"] for entry in _read(_State, folder / STATE)["_data_files"]]
        if wrong := [name for name in names if name.lower().endswith(".parquet")]:
            raise DataError(f"{folder / STATE} names {wrong[0]}, which is no Arrow stream.", _SAVE_HINT)
    else:
        names = _parquet_names(folder)
    return [inside(folder, name) for name in names]


def digest(path: Path) -> str:
    """Returns the sha256 in hex of a file, or of the names and digests of all files of a data folder without splits.

    Raises:
        OSError: A file cannot be read.
        DataError: As in `list_files`.
    """
    if path.is_dir():
        lines = [f"{file.name} {digest(file)}\n" for file in list_files(path)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_splits(folder: Path) -> list[str]:
    return _read(_Splits, folder / SPLITS)["splits"]


def _read(kind: type[T], file: Path) -> T:
    try:
        return decode(kind, read_bytes(file))
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {cause}.", _SAVE_HINT) from error


def _parquet_names(folder: Path) -> list[str]:
    try:
        entries = list(itertools.islice(folder.iterdir(), MAX_FILES + 1))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", "Pass a readable folder.") from error
    if len(entries) > MAX_FILES:
        raise DataError(f"{folder} has more than {MAX_FILES:,} files.", "Save the data in fewer files.")
    names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".parquet"))
    if not names:
        raise DataError(
            f"{folder} has neither a .parquet file nor {STATE} or {SPLITS}.",
            "Pass a folder of Parquet files, or a folder that datasets.Dataset.save_to_disk wrote.",
        )
    return names


def inside(folder: Path, name: str) -> Path:
    """Returns the path of an entry of the folder; refuses a link that leads out of the folder."""
    path = folder / name
    if not path.exists():
        raise DataError(f"{path} does not exist.", "Copy or save the folder again.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} is a link that leads out of the folder.", "Replace the link by a copy of its file.")
    return path
