"""The session file: the settings of ONNX Runtime that `tune --session` recommends for one artifact on one machine.

Somebody else may have written a session file, so `SessionFile.read` checks every field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ResultFileError
from toolchain.results.session_settings import AppSettings
from toolchain.results.statistics import Ratio
from toolchain.system import files
from toolchain.system.decoding import Count, Line, decode, read_bytes, strict
from toolchain.system.hardware import StoredMachine

SCHEMA = 1
LATENCY, THROUGHPUT, MEMORY = OBJECTIVES = ("latency", "throughput", "memory")
MAX_SCREENED = 1000


def is_better(ratio: Ratio | None) -> bool:
    """Returns whether settings are better than the default settings: the interval of their ratio is above 1."""
    return ratio is not None and ratio.low is not None and ratio.low > 1


@strict
@dataclass(frozen=True)
class Choice:
    """The result of a search for one objective.

    Attributes:
        settings: The recommended settings: `tried` if they are better than `default`, and otherwise `default`.
        default: The default settings.
        tried: The settings that the last comparison compared with `default`; None without a comparison.
        ratio: Figure of `default` / figure of `tried`, with its interval; above 1, `tried` is better. The figure is a
            time for each sentence, or a number of bytes. None without a comparison.
    """

    settings: AppSettings
    default: AppSettings
    tried: AppSettings | None = None
    ratio: Ratio | None = None

    def __post_init__(self) -> None:
        if (self.tried is None) != (self.ratio is None):
            raise ValueError("the tried settings and their ratio are only given together")
        if self.settings != (self.tried if is_better(self.ratio) else self.default):
            raise ValueError("the settings do not follow from the ratio")

    @classmethod
    def from_comparison(cls, default: AppSettings, tried: AppSettings, ratio: Ratio) -> Choice:
        """Returns the choice between the default settings and the settings that were compared with them."""
        # The file stores rounded numbers, and the decision must follow from the stored numbers.
        stored = Ratio(**ratio.to_json())
        return cls(tried if is_better(stored) else default, default, tried, stored)


@strict
@dataclass(frozen=True)
class Screened:
    """One alternative to the default settings, and its ratio in the short comparison of the search.

    Attributes:
        factor: Name of the setting that differs from the default.
        objective: One of `OBJECTIVES`.
        settings: The settings.
        ratio: Figure of the default settings / figure of these settings.
    """

    factor: Line
    objective: Line
    settings: AppSettings
    ratio: Ratio


@strict
@dataclass(frozen=True)
class SessionData:
    """The texts that the search ran: name and digest of the data, and the number of texts."""

    name: Line
    sha256: Line
    rows: Count


@strict
@dataclass(frozen=True)
class SessionFile:
    """The content of a session file.

    Attributes:
        created: Date and time of the result, in UTC and ISO 8601 format.
        toolchain: Release of the toolchain.
        machine: Description of the machine; see `hardware.machine`.
        model: Name of the model.
        variant: Name of the variant.
        artifact_id: Id of the measured artifact; the settings are valid for this artifact only.
        data: The texts.
        latency: Settings for one text at a time.
        throughput: Settings for texts in batches.
        memory: Settings for little memory.
        screened: All alternatives that the search compared.
        schema: `SCHEMA`.
    """

    created: Line
    toolchain: Line
    machine: StoredMachine
    model: Line
    variant: Line
    artifact_id: Line
    data: SessionData
    latency: Choice
    throughput: Choice
    memory: Choice
    screened: tuple[Screened, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"the schema is {self.schema}, but this program reads schema {SCHEMA}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.artifact_id):
            raise ValueError("artifact_id is not the id of an artifact")
        if len(self.screened) > MAX_SCREENED:
            raise ValueError(f"it has more than {MAX_SCREENED} alternatives")

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Returns the choice for each of `OBJECTIVES`."""
        return {name: getattr(self, name) for name in OBJECTIVES}

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return {"schema": self.schema, **asdict(self)}

    def to_text(self) -> str:
        """Returns the text of the file."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> SessionFile:
        """Reads and checks a session file.

        Raises:
            ResultFileError: The file is missing, unreadable, of another schema, or contradicts itself.
        """
        hint = "Write a new file with `toolchain tune --session VARIANT`."
        try:
            return decode(cls, read_bytes(path))
        except FileNotFoundError as error:
            raise ResultFileError(f"There is no session file {path}.", hint) from error
        except (ValueError, OSError) as error:
            raise ResultFileError(f"{path} is not a valid session file: {error}.", hint) from error


def require_replaceable(path: Path) -> None:
    """Requires that `path` is free, or holds a session file.

    Raises:
        ResultFileError: `path` holds something else.
    """
    if not (path.exists() or path.is_symlink()):
        return
    try:
        SessionFile.read(path)
    except ResultFileError as error:
        raise ResultFileError(
            f"{path} exists and is not a session file.", "Choose another path with --output, or move the file away."
        ) from error


def save(result: SessionFile, path: Path, *, replace: bool) -> Path:
    """Writes a session file and returns its path.

    Args:
        result: The content.
        path: Path of the file.
        replace: Whether to replace an existing file; otherwise the function changes the name until it is free.

    Raises:
        ResultFileError: The file cannot be written.
    """
    try:
        if not replace:
            return files.write_to_free(path, result.to_text())
        files.write_whole(path, result.to_text())
    except OSError as error:
        raise ResultFileError.unwritable(path, error) from error
    return path
