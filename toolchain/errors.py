"""The errors that the toolchain reports to its user.

* `ToolchainError`: the base class of all errors; has the exit code 1, and states the cause and the fix.
    * `SettingsError`: exit code 2; the settings of a step exclude each other, or a setting is invalid.
    * `UnknownVariantError`: the model has no variant with the requested name.
    * `CheckpointError`: the checkpoint is unreadable, or is not a classifier.
        * `HubError`: the model hub is unreachable, or refuses a request.
    * `DataError`: the sentences or labels are unusable.
    * `ArtifactError`: a folder under exported/ cannot be read, written or replaced.
        * `TamperedError`: the files of an artifact do not match its manifest.
    * `PruningError`: the model cannot be pruned with this method, or by this ratio.
    * `GraphError`: the file is no valid ONNX file, or a pass does not apply to its graph.
    * `ProviderError`: the execution provider is unavailable, or a session runs on another provider than requested.
    * `DeviceMemoryError`: the device has too little memory for the model or a batch.
    * `ShippingError`: no bundle can be built from the chosen variants, or written to the chosen folder.
    * `BenchError`: a benchmark cannot measure a cell, or has no usable result.
    * `RecipeError`: a recipe is unreadable or contradicts itself, or a checkpoint or data that it needs is missing.
    * `ClusterError`: the Ray cluster is unreachable, was lost, or has an unusable node.
    * `ResultFileError`: the result file cannot be read or written.
    * `SystemRefusalError`: the operating system refuses to read or write a file.
    * `VerdictError`: exit code 3; a check completed with a negative result.
"""

from __future__ import annotations

import os
from pathlib import Path


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error message, or the name of the error's class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ToolchainError(Exception):
    """A failure that the user can fix.

    Attributes:
        cause: A sentence that states the problem.
        hint: A sentence that states the fix; empty if there is none.
        exit_code: Exit code of the process.
        code: Code of the error; `toolchain explain CODE` explains it.
    """

    exit_code = 1
    code = "E-FAILED"

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause, hint)
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.cause} {self.hint}".strip()


class SettingsError(ToolchainError):
    """A setting of a step has no valid value, or two settings of a step exclude each other."""

    code = "E-SETTINGS"

    exit_code = 2


class UnknownVariantError(ToolchainError):
    """The model has no variant with the requested name."""

    code = "E-VARIANT"


class CheckpointError(ToolchainError):
    """The checkpoint cannot be read, is unsafe to read, or is not a sequence classifier."""

    code = "E-CHECKPOINT"


class HubError(CheckpointError):
    """The model hub is unreachable, or refuses a request."""

    code = "E-HUB"


class DataError(ToolchainError):
    """Columns, labels or rows of the data are missing or unusable."""

    code = "E-DATA"


class ArtifactError(ToolchainError):
    """An artifact folder cannot be read, written or replaced."""

    code = "E-ARTIFACT"

    @classmethod
    def unwritable(cls, folder: Path, error: OSError) -> ArtifactError:
        """Returns the error for a folder that the operating system refuses to write."""
        return cls(
            f"{folder} cannot be written: {error.strerror or error}.",
            "Free space or correct the permissions, or choose another folder with --exported DIR (for a bundle: "
            "--output DIR).",
        )


class TamperedError(ArtifactError):
    """The files of an artifact do not match the digests in its manifest."""

    code = "E-TAMPERED"


class PruningError(ToolchainError):
    """The architecture, the ratio or another setting does not allow pruning, or a file of latencies is invalid."""

    code = "E-PRUNING"


class GraphError(ToolchainError):
    """An ONNX graph cannot be read, or does not meet the precondition of a pass."""

    code = "E-GRAPH"


class ProviderError(ToolchainError):
    """An execution provider is unavailable, or a session runs on another provider than requested."""

    code = "E-PROVIDER"


class DeviceMemoryError(ToolchainError):
    """A device has too little memory for the model or a batch."""

    code = "E-MEMORY"

    @classmethod
    def failed_allocation(cls, size_bytes: int | None) -> DeviceMemoryError:
        """Returns the error for a failed allocation; `size_bytes` is None if the runtime does not report the size."""
        cause = "The device has too little memory."
        if size_bytes is not None:
            cause = f"The device has too little memory for the requested {size_bytes / 2**20:,.0f} MiB."
        return cls(
            cause,
            "Free memory on the device, measure fewer variants at once with --variant, or use a smaller model.",
        )


class ShippingError(ToolchainError):
    """A bundle cannot be built from the chosen variants, for the chosen target, or in the chosen folder."""

    code = "E-SHIPPING"


class BenchError(ToolchainError):
    """A benchmark cannot measure a cell, or has no usable result."""

    code = "E-BENCH"


class RecipeError(ToolchainError):
    """A recipe cannot be read, contradicts itself, or needs a checkpoint or training data that is not there."""

    code = "E-RECIPE"


class ClusterError(ToolchainError):
    """A Ray cluster is unreachable, was lost, or has an unusable node."""

    code = "E-CLUSTER"


class ResultFileError(ToolchainError):
    """A result file is truncated, has another schema, contradicts itself, or cannot be written."""

    code = "E-RESULT"

    @classmethod
    def unwritable(cls, path: Path, error: OSError) -> ResultFileError:
        """Returns the error for a file that the operating system refuses to write."""
        return cls(f"{path} cannot be written: {error.strerror or error}.", "Free space, or correct the permissions.")


class SystemRefusalError(ToolchainError):
    """The operating system refuses to read or write a file, for example because the disk is full or read-only."""

    code = "E-SYSTEM"

    @classmethod
    def from_os_error(cls, error: OSError) -> SystemRefusalError:
        """Returns the error for a refusal that no other part of the toolchain expects."""
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return cls(
            f"{place}{error.strerror or first_line(error)}.",
            "Free space, correct the path or its permissions, or choose another place.",
        )


class VerdictError(ToolchainError):
    """A check, such as a validation or a comparison with a limit, completed with a negative result."""

    code = "E-VERDICT"

    exit_code = 3
