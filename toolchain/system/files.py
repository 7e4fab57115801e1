"""Atomic and durable file writes: a reader sees the complete old content or the complete new content of a file.

The functions flush a file to the disk before they rename it, and flush its folder after the rename. So a power loss
leaves the old file or the new file, never an incomplete one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust describes an error of the operating system
# Error numbers with which the operating system refuses to write a file.
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)


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
        make_folder(path.parent)
    # A random name avoids a collision with a user's file and with a parallel run. It is independent of the file's name,
    # which may already have the greatest length that the file system allows.
    scratch = path.with_name(f".{secrets.token_hex(16)}")
    try:
        with name_place(path), scratch.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(scratch, path)
            flush(path.parent)
        else:
            move_to_free(scratch, path)
    finally:
        with suppress(OSError):  # a failed deletion must not hide an error of the write
            scratch.unlink()


def write_cache(path: Path, content: str) -> None:
    """Writes a file as `write_whole` does, unless the disk refuses it.

    Use this function for results that the next run can compute again, so that a read-only folder stops no command.
    """
    with suppress(OSError):
        write_whole(path, content)


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

    The caller flushes `source` before; the function flushes the folder of `path`. If the disk refuses that, the
    function undoes the rename.

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
    try:
        flush(path.parent)
    except OSError:
        if source.exists():  # after a hard link, both names exist
            path.unlink()
        else:
            os.replace(path, source)
        raise
    with suppress(FileNotFoundError):  # after a rename, `source` is gone
        source.unlink()


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes their names to the disk.

    Raises:
        FileExistsError: `path` or one of its parents is a file.
        OSError: A folder cannot be created.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


@contextmanager
def name_place(path: Path) -> Iterator[None]:
    """Adds `path` to each error of the operating system that names no file, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # libraries raise OSErrors with only a text
            error.filename = os.fspath(path)
        raise


@contextmanager
def writing_in_rust(path: Path) -> Iterator[None]:
    """Converts the errors of safetensors and tokenizers for a failed write of `path` to an `OSError` with the path.

    Both libraries are written in Rust. tokenizers raises a plain `Exception`, whose text ends with the error number.
    """
    from safetensors import SafetensorError

    with name_place(path):
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            number = _RUST_ERROR.search(str(error))
            if not number and not isinstance(error, SafetensorError):
                raise
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), os.fspath(path)) from error


@contextmanager
def temporary_folder(prefix: str | None = None) -> Iterator[Path]:
    """Yields a new folder among the system's temporary files, and deletes it on exit."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, name_place(Path(folder)):
        yield Path(folder)


def flush(path: Path) -> None:
    """Waits until the disk has the content of a file, or the names of the files in a folder.

    The function ignores a folder that cannot be flushed: one that the user may not read, or that of a network file
    system.

    Raises:
        OSError: The disk refuses the content, for example because it is full.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES) or not path.is_dir():
            raise


def flush_tree(folder: Path) -> None:
    """Waits until the disk has all files and folders under `folder`; raises the same errors as `flush`."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(folder)
