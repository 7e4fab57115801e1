"""Files on this machine and behind URLs such as ``s3://``, through the libraries pyarrow and fsspec.

A URL may contain a password or a signature. `public_name` removes both, and only its result is shown or stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from toolchain.errors import DataError, ToolchainError, first_line

COPY_BYTES = 1 << 22  # a file behind a URL is copied in blocks of this size
# Kinds of URLs that pyarrow opens
_ARROW = ("s3", "gs")
# Facts with which file systems describe the content or the time of the last change, the most precise first.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "md5", "checksum", "oid", "blob_id",
    "mtime", "LastModified", "modified", "updated", "created",
)  # fmt: skip


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
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def convert_storage_errors(name: str, action: str = "read") -> Iterator[None]:
    """Converts every error of a file system behind a URL to a `DataError` with its cause and a hint.

    Args:
        name: The URL.
        action: What the caller does: ``read`` or ``written``, as a past participle.
    """
    shown = public_name(name)
    try:
        yield
    except ToolchainError:
        raise
    except PermissionError as error:
        raise DataError(
            f"Access to {shown} was refused ({first_line(error)}).",
            "Set the credentials of the storage, as its library describes, for a user who may use this path.",
        ) from error
    except ImportError as error:
        raise DataError(f"{shown} needs a package that is not installed.", _package_hint(shown, error)) from error
    except Exception as error:  # each file system raises errors of its own library
        # For a refused key, pyarrow raises a `FileNotFoundError` as well if it writes.
        if isinstance(error, FileNotFoundError) and action == "read":
            raise DataError(f"{shown} does not exist.", "Correct the name of the bucket, folder or file.") from error
        raise DataError(
            f"{shown} cannot be {action} ({type(error).__name__}: {first_line(error)}).",
            "Check the URL, the connection and the credentials, then run the same command again.",
        ) from error


def _package_hint(name: str, error: ImportError) -> str:
    packages = {"abfs": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko"}
    package = packages.get(name.partition("://")[0])
    return f"Install it with `pip install {package}`." if package else f"{first_line(error).rstrip('.')}."


def open_file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, with the interface of fsspec, and the path in this file system.

    The library pyarrow has file systems for S3 and Google Cloud Storage, which need no further package.

    Raises:
        DataError: The protocol is unknown, or its package is not installed.
    """
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    if "::" in url:
        raise DataError(f"{public_name(url)} chains several file systems.", "Pass the URL of the files themselves.")
    parts = urlsplit(url)
    with convert_storage_errors(url):
        if parts.scheme in _ARROW:
            file_system, bucket = FileSystem.from_uri(urlunsplit((parts.scheme, parts.netloc, "", parts.query, "")))
            return ArrowFSWrapper(file_system), f"{bucket.strip('/')}{parts.path}".rstrip("/")
        try:
            file_system, path = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise DataError(
                f"The kind of the URL {public_name(url)} is unknown ({first_line(error)}).",
                "Use a URL that the library fsspec can open, such as s3://BUCKET/FOLDER/.",
            ) from error
    return file_system, str(path)


def version_of(facts: Mapping[str, Any]) -> str:
    """Returns a text that changes with the content of a file behind a URL; empty if the storage has no such fact."""
    return next((str(facts[key])[:200] for key in _VERSIONS if facts.get(key) is not None), "")


def copy_to_local(system: Any, path: str, name: str, target: Path, size: int) -> None:
    """Copies a file of a file system to a local file.

    Args:
        system: The file system.
        path: Path of the file in the file system.
        name: Name of the file for messages.
        target: The local file.
        size: The size that the storage states for the file.

    Raises:
        DataError: The file cannot be read, has another size, or does not fit on the disk.
    """
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise DataError(
            f"{name} has {size:,} bytes, but {target.parent} has only {free:,} free bytes.",
            "Free space, or set TMPDIR to a folder on a larger disk.",
        )
    copied = 0
    with target.open("wb") as copy, convert_storage_errors(name), system.open(path, "rb") as stream:
        while copied <= size and (block := stream.read(COPY_BYTES)):
            copied += len(block)
            copy.write(block)
    if copied != size:
        states = f"ended after {copied:,} bytes" if copied < size else "has more bytes"
        raise DataError(
            f"{name} {states}, but the storage states {size:,} bytes.",
            "Wait until no program writes the file, then run the same command again.",
        )
