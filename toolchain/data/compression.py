"""Opens compressed text files, and stops a file that grows without bound when it is decompressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

from toolchain.errors import DataError

# Endings of compressed files.
ENDINGS = (".gz", ".bz2", ".xz", ".zst")
# A compressed file may grow to `MOST_GROWTH` times its size; a smaller file may always grow to `FREE_BYTES`. Logs with
# many equal lines grow about a hundred times. A file that was made to fill a disk grows a thousand times or more.
MOST_GROWTH = 250
FREE_BYTES = 1 << 26
_HINT = "Decompress the file with another program, if you trust the file."


def strip_ending(name: str) -> str:
    """Returns the name without the ending of a compressed file, such as ``a.csv`` for ``a.csv.gz``."""
    path = Path(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in ENDINGS else name


def open_text(file: str, encoding: str, newline: str) -> IO[str]:
    """Opens a text file, and decompresses it if its name has one of `ENDINGS`.

    Reading raises:
        DataError: The decompressed text is more than `MOST_GROWTH` times as large as the file.
        OSError, EOFError, lzma.LZMAError: The file is unreadable, is damaged, or ends too early.
    """
    ending = Path(file).suffix.lower()
    if ending not in ENDINGS:
        return open(file, encoding=encoding, newline=newline)
    limit = max(FREE_BYTES, MOST_GROWTH * Path(file).stat().st_size)
    stream = io.BufferedReader(_Bounded(_open_binary(file, ending), file, limit))
    return io.TextIOWrapper(stream, encoding=encoding, newline=newline)


def _open_binary(file: str, ending: str) -> Any:
    if ending == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[ending](file, "rb")


class _Bounded(io.RawIOBase):
    """The bytes of another stream, of which a reader gets at most `limit`."""

    def __init__(self, stream: Any, file: str, limit: int) -> None:
        self._stream, self._file, self._left, self._limit = stream, file, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(f"{self._file} grows to more than {self._limit:,} bytes when it is decompressed.", _HINT)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()
