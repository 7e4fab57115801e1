"""Files on this machine and behind URLs such as ``s3://``, through the library fsspec.

A URL may contain a password or a signature. `public_name` removes both, and only its result is shown or stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from toolchain.errors import DataError, ToolchainError, first_line
from toolchain.system import files

COPY_BYTES = 1 << 22  # a file behind a URL is copied in blocks of this size
# Facts with which file systems describe the content or the time of the last change, the most precise first.
_VERSIONS = ("ETag", "etag", "md5Hash", "md5", "checksum", "oid", "blob_id", "mtime", "LastModified", "last_modified")
_VERSIONS += ("modified", "updated", "created")


def is_url(name: str) -> bool:
    """Returns whether the name is a URL of another machine; a ``file://`` URL is a local file."""
    return "://" in name and not name.startswith("file://")


def local_name(name: str) -> str:
    """Returns the path of a ``file://`` URL, and any other name unchanged."""
    return url2pathname(urlsplit(name).path) if name.startswith("file://") else name


def public_name(name: str) -> str:
    """Returns a name for messages and records: a URL without its user, password, query and fragment."""
    if not is_url(name):
        return name
    parts = urlsplit(name)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def convert_storage_errors(name: str, action: str = "read") -> Iterator[None]:
    """Converts every error of a file system behind a URL to a `DataError` with its cause and a hint."""
    shown = public_name(name)
    try:
        yield
    except ToolchainError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{shown} does not exist ({first_line(error)}).", "Correct the name of the bucket, folder or file."
        ) from error
    except PermissionError as error:
        raise DataError(
            f"Access to {shown} was refused ({first_line(error)}).",
            "Set the credentials of the storage, as its library describes, for a user who may use this path.",
        ) from error
    except ImportError as error:
        raise DataError(f"{shown} needs a package that is not installed.", _package_hint(shown, error)) from error
    except Exception as error:  # each file system raises errors of its own library
        raise DataError(
            f"{shown} cannot be {'read' if action == 'read' else 'written'} ({type(error).__name__}: "
            f"{first_line(error)}).",
            "Check the URL, the connection and the credentials, then run the same command again.",
        ) from error


def _package_hint(name: str, error: ImportError) -> str:
    packages = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
    packages |= {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "sftp": "paramiko"}
    package = packages.get(name.partition("://")[0])
    return f"Install it with `pip install {package}`." if package else f"{first_line(error).rstrip('.')}."


def open_file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in this file system.

    Raises:
        DataError: The protocol is unknown, or its package is not installed.
    """
    import fsspec

    if "::" in url:
        raise DataError(f"{public_name(url)} chains several file systems.", "Pass the URL of the files themselves.")
    with convert_storage_errors(url):
        try:
            file_system, path = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise DataError(
                f"The kind of the URL {public_name(url)} is unknown ({first_line(error)}).",
                "Use a URL that the library fsspec can open, such as s3://BUCKET/FOLDER/.",
            ) from error
    return file_system, str(path)


def version_of(facts: dict[str, Any]) -> str:
    """Returns a text that changes with the content of a file behind a URL; empty if the storage has no such fact."""
    return next((str(facts[key])[:200] for key in _VERSIONS if facts.get(key) is not None), "")


def copy_to_local(url: str, target: Path, size: int) -> None:
    """Copies the file behind a URL to a local file.

    Args:
        url: The URL of the file.
        target: The local file.
        size: The size that the storage states for the file.

    Raises:
        DataError: The file cannot be read, has another size, or does not fit on the disk.
    """
    shown, free = public_name(url), shutil.disk_usage(target.parent).free
    if size > free:
        raise DataError(
            f"{shown} has {size:,} bytes, but {target.parent} has only {free:,} free bytes.",
            "Free space, or set TMPDIR to a folder on a larger disk.",
        )
    file_system, path = open_file_system(url)
    copied = 0
    with target.open("wb") as copy, files.name_place(target):
        with convert_storage_errors(url), file_system.open(path, "rb") as stream:
            while block := stream.read(COPY_BYTES):
                copied += len(block)
                if copied > size:
                    break
                _write_block(copy, block, target)
    if copied != size:
        raise DataError(
            f"{shown} ended after {min(copied, size):,} bytes, but the storage states {size:,} bytes."
            if copied < size
            else f"{shown} has more than the {size:,} bytes that the storage states.",
            "Wait until no program writes the file, then run the same command again.",
        )


def _write_block(copy: Any, block: bytes, target: Path) -> None:
    try:
        copy.write(block)
    except OSError as error:
        raise DataError(
            f"{target.parent} cannot be written: {error.strerror or error}.", "Free space in the folder TMPDIR."
        ) from error
