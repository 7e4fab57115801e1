"""Atomic publication: a folder or file is built under a lock, in a hidden folder, and then renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ArtifactError
from toolchain.system import files

if TYPE_CHECKING:
    from filelock import FileLock

# Part of the name of every hidden folder that this module creates. The digits in `WORK` are constant. They were chosen
# at random once, to prevent a clash with the names of the user's folders.
WORK = "toolchain-6f1d0b9c"


def work_folder(target: Path) -> Path:
    """Returns the hidden work folder beside `target`, for all files of a run that builds `target`.

    Use the work folder only under `lock`. The name of the work folder ends in the constant `WORK`. This constant
    contains digits that were chosen at random once, so that no other program uses the same name. This module computes
    the name of the work folder and never searches for folders, so it never changes a folder with a similar name.
    """
    target = Path(os.path.abspath(target))  # `Path(".").name` is empty
    return target.with_name(f".{target.name}.{WORK}")


@contextmanager
def lock(target: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Locks `target` for one process, and repairs the folders that a killed run left.

    On exit, the function deletes the work folder, unless this folder holds files from which a later run can resume.

    Args:
        target: The folder or file to build.
        on_wait: Called once before the function waits for another process to release the lock.

    Raises:
        ArtifactError: The operating system refuses to write beside `target`.
    """
    work = work_folder(target)
    try:
        guard = _acquire(work, on_wait)
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    try:
        _repair_folders(target)
        yield
    finally:
        # Delete the lock file before the release of the lock, so that a waiting process notices the deletion and opens
        # a new lock file.
        Path(guard.lock_file).unlink(missing_ok=True)
        # `rmdir` fails if the work folder holds files from which a run can resume, or another run's lock file.
        with suppress(OSError):
            work.rmdir()
        guard.release()


def _acquire(work: Path, on_wait: Callable[[], None]) -> FileLock:
    """Locks the work folder, and creates it if it is missing."""
    from filelock import FileLock, Timeout

    guard = FileLock(work / "lock")
    timeout, retries = 0, 100
    while True:
        try:
            files.make_folder(work)
            guard.acquire(timeout=timeout)
            return guard
        except Timeout:
            on_wait()
            timeout = -1  # no limit
        except (FileNotFoundError, FileExistsError):
            # Another run may delete the work folder between `mkdir` and `acquire`. Try again.
            retries -= 1
            if not retries:
                raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yields a new scratch folder on the file system of `target`, and deletes it on exit unless `replace` moved it.

    Use the scratch folder only under `lock`.

    Raises:
        ArtifactError: The operating system refuses to write beside `target`, in this function or in the ``with`` block.
    """
    scratch = work_folder(target) / "building"
    try:
        scratch.mkdir()
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    try:
        with files.name_place(scratch):
            yield scratch
    except OSError as error:
        if error.errno in files.REFUSALS and Path(os.fsdecode(error.filename)).is_relative_to(scratch):
            raise ArtifactError.unwritable(target.parent, error) from error
        raise
    finally:
        _delete_folder(scratch)


def replace(scratch: Path, target: Path) -> None:
    """Renames the scratch folder to `target`, then deletes the previous `target`. Call this function only under `lock`.

    The function flushes all files of the scratch folder to the disk before the renames, and the renames before it
    deletes the previous `target`. So a power loss leaves the previous or the new `target`, or the backup of the
    previous one, which `lock` restores.

    Raises:
        ArtifactError: The operating system refuses to flush a file or to rename a folder, so the function restores the
            previous `target`.
    """
    backup = _backup_folder(target)
    is_renamed = False
    try:
        files.flush_tree(scratch)
        if target.exists():
            target.rename(backup)
        scratch.rename(target)
        is_renamed = True
        files.flush(target.parent)
    except OSError as error:
        if is_renamed:
            target.rename(scratch)
        _repair_folders(target)
        raise ArtifactError.unwritable(target.parent, error) from error
    _delete_folder(backup)


def _backup_folder(target: Path) -> Path:
    return work_folder(target) / "old"


def _repair_folders(target: Path) -> None:
    """Restores the previous `target` if a killed run left no `target`; deletes the backup and the scratch folder."""
    backup = _backup_folder(target)
    if os.path.lexists(backup) and not os.path.lexists(target):
        backup.rename(target)
    for folder in (backup, work_folder(target) / "building"):
        _delete_folder(folder)


def _delete_folder(path: Path) -> None:
    """Deletes a folder or a link to a folder, and ignores files that it cannot delete."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
