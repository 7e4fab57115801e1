"""Files written whole: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Writes a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    Args:
        path: Where to write. Folders that are missing are made.
        content: The whole file; text is stored as UTF-8.
        replace: Whether an existing file may be replaced.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: The file cannot be written.
    """
    with suppress(FileExistsError):  # a file in the folder's place fails below
        path.parent.mkdir(parents=True)
    # A random name: no other file, a user's or another run's, has it.
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
        with suppress(OSError):  # the write has an error of its own to tell
            scratch.unlink()


def write_to_free(path: Path, content: str | bytes) -> Path:
    """Writes a new file whole, to `path` or, where that exists, to the same name with `.2`, `.3`, … before its ending.

    Returns:
        The path of the new file; no file that exists is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    number = 1
    while True:
        free = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            write_whole(free, content, replace=False)
        except FileExistsError:
            number += 1
        else:
            return free


def move_to_free(source: Path, path: Path) -> None:
    """Renames the file `source` to `path` on the same file system, whole and never over another file.

    Raises:
        FileExistsError: `path` exists.
        OSError: The file cannot be renamed.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file holds the name until the whole one is there
        path.open("xb").close()
        try:
            os.replace(source, path)
        except OSError:
            path.unlink()
            raise
    else:
        source.unlink()
