"""Atomic file writes: a reader sees the complete old content or the complete new content of a file."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Writes a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Args:
        path: Path of the file to write. The function creates missing folders.
        content: Content of the file; text is encoded as UTF-8.
        replace: Whether an existing file may be replaced.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: The file cannot be written.
    """
    with suppress(FileExistsError):  # if the parent of `path` is a file, `scratch.open` raises an error
        path.parent.mkdir(parents=True)
    # A random name avoids a collision with a user's file and with a parallel run.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(scratch, path)
        else:
            move_to_free(scratch, path)
    finally:
        with suppress(OSError):  # a failed deletion must not hide an error of the write
            scratch.unlink()


def write_to_free(path: Path, content: str | bytes) -> Path:
    """Writes a new file atomically and never replaces an existing one.

    If `path` exists, the function inserts `.2`, `.3`, … before the suffix until the name is free.

    Returns:
        The path of the new file.

    Raises:
        OSError: The file cannot be written.
    """
    number = 1
    while True:
        free_path = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            write_whole(free_path, content, replace=False)
        except FileExistsError:
            number += 1
        else:
            return free_path


def move_to_free(source: Path, path: Path) -> None:
    """Renames the file `source` to `path` on the same file system, atomically, and never replaces an existing file.

    Raises:
        FileExistsError: `path` exists.
        OSError: The file cannot be renamed.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # without hard links on the file system, an empty file reserves the name until the rename
        path.open("xb").close()
        try:
            os.replace(source, path)
        except OSError:
            path.unlink()
            raise
    else:
        source.unlink()
