"""Building a folder or file under a lock, in a hidden folder beside its place, and renaming it there when whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ArtifactError

if TYPE_CHECKING:
    from filelock import FileLock

# Ends or begins the names of our folders among a user's; the random digits tell them from any the user has.
WORK = "toolchain-6f1d0b9c"


def work_folder(target: Path) -> Path:
    """The hidden folder beside `target` that holds all a run needs while it writes `target`; to be used under `lock`.

    Nobody else makes this name. It is computed and never searched for, so a name that only looks like it is left alone.
    """
    target = Path(os.path.abspath(target))  # `.` has no name
    return target.with_name(f".{target.name}.{WORK}")


@contextmanager
def lock(target: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds `target` for one process and repairs what a killed run left; calls `waiting` before it blocks.

    Nothing is left beside `target` but what a later run can go on from.
    """
    work = work_folder(target)
    try:
        guard = _acquire(work, waiting)
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    try:
        _recover(target)
        yield
    finally:
        # Deleted while it is held: a process that opened this file before sees that it has no name and opens another.
        Path(guard.lock_file).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: a training or scored texts to go on from, or another run's new lock
            work.rmdir()
        guard.release()


def _acquire(work: Path, waiting: Callable[[], None]) -> FileLock:
    """Locks the work folder, making it where it is missing."""
    from filelock import FileLock, Timeout

    guard = FileLock(work / "lock")
    timeout, retries = 0, 100
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            guard.acquire(timeout=timeout)
            return guard
        except Timeout:
            waiting()
            timeout = -1  # no limit
        except (FileNotFoundError, FileExistsError):
            # A run that ends deletes the folder, perhaps between these lines: try again.
            retries -= 1
            if not retries:
                raise


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A scratch folder on the file system of `target`, gone afterwards unless it was published; under `lock`."""
    scratch = work_folder(target) / "building"
    try:
        scratch.mkdir()
    except OSError as error:
        raise ArtifactError.unwritable(target.parent, error) from error
    try:
        yield scratch
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise ArtifactError.unwritable(target.parent, error) from error
        raise
    finally:
        _delete(scratch)


def replace(scratch: Path, target: Path) -> None:
    """Renames the folder into place, what was there being gone only when that is done; under `lock`."""
    old = _old(target)
    try:
        if target.exists():
            target.rename(old)
        scratch.rename(target)
    except OSError as error:
        _recover(target)
        raise ArtifactError.unwritable(target.parent, error) from error
    _delete(old)


def _old(target: Path) -> Path:
    return work_folder(target) / "old"


def _recover(target: Path) -> None:
    """Puts back what a run that was killed between two renames had set aside, and deletes its scratch folder."""
    old = _old(target)
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
    for left in (old, work_folder(target) / "building"):
        _delete(left)


def _delete(path: Path) -> None:
    """Deletes a folder, or the link to one, as far as that is possible."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
