"""Everything that can go wrong in words a user can act on.

ToolchainError                exit 1: a sentence with the cause, a sentence with the mend
├── UnknownVariantError       no such variant for this model ("did you mean …")
├── CheckpointError           the checkpoint cannot be read, or is not a classifier
│   └── HubError              the model hub did not give it
├── DataError                 sentences or labels that cannot be used
├── ArtifactError             a folder under exported/ that cannot be read, written or replaced
│   └── TamperedError         files that no longer match their manifest
├── PruningError              a model that cannot be pruned so, or so far
├── GraphError                an ONNX file that is none, or a rewrite that does not apply to it
├── ProviderError             an execution provider that cannot serve here, or did not
├── DeviceMemoryError         a device without room for the model or a batch
├── ShippingError             a bundle that cannot be made of these variants, or not there
├── BenchError                nothing could be measured
├── ClusterError              a Ray cluster that is not there, dies, or has a node of another release
├── ResultFileError           a result file that cannot be read or written
└── VerdictError              exit 3: everything ran, and the answer is no
"""

from __future__ import annotations

from pathlib import Path


class ToolchainError(Exception):
    """A failure the user can mend: `cause` says what is wrong, `mend` what to do; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, cause: str, mend: str = "") -> None:
        super().__init__(cause, mend)
        self.cause = cause
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.cause} {self.mend}".strip()


class UnknownVariantError(ToolchainError):
    """No variant of that name."""


class CheckpointError(ToolchainError):
    """The checkpoint cannot be read, is unsafe to read, or is not a sequence classifier."""


class HubError(CheckpointError):
    """The model hub could not be reached or refused."""


class DataError(ToolchainError):
    """Evaluation data without the columns, labels or rows it needs."""


class ArtifactError(ToolchainError):
    """An artifact folder that cannot be read, written or replaced."""

    @classmethod
    def unwritable(cls, folder: Path, error: OSError) -> ArtifactError:
        """For a folder that the system does not let us write."""
        return cls(
            f"{folder} cannot be written: {error.strerror or error}.",
            "Free the space or the permission, or choose another place with --exported DIR (for a bundle: "
            "--output DIR).",
        )


class TamperedError(ArtifactError):
    """An artifact whose bytes are not those its manifest was sealed with."""


class PruningError(ToolchainError):
    """A model that cannot be pruned: its layout, the ratio, or what it was ranked by does not allow it."""


class GraphError(ToolchainError):
    """An ONNX graph that cannot be read, or that a rewrite's precondition does not hold for."""


class ProviderError(ToolchainError):
    """An execution provider that is not there, or a session that runs on another one than asked."""


class DeviceMemoryError(ToolchainError):
    """A device without room for what was asked of it."""

    @classmethod
    def asked(cls, size_bytes: int | None) -> DeviceMemoryError:
        """For an allocation of so many bytes; None where the runtime does not say how many."""
        what = "what" if size_bytes is None else f"the {size_bytes / 2**20:,.0f} MiB"
        return cls(
            f"The device has no room for {what} it was asked for.",
            "Free the device, measure fewer variants at once with --variant, or take a smaller model.",
        )


class ShippingError(ToolchainError):
    """A bundle that cannot be made of these variants, for this target, or in this place."""


class BenchError(ToolchainError):
    """A measurement that could not be made."""


class ClusterError(ToolchainError):
    """A Ray cluster that cannot be reached, was lost, or has a node that cannot take part."""


class ResultFileError(ToolchainError):
    """A result file that is truncated, of another schema, contradicts itself, or cannot be written."""

    @classmethod
    def unwritable(cls, path: Path, error: OSError) -> ResultFileError:
        """For a file that the system does not let us write."""
        return cls(f"{path} cannot be written: {error.strerror or error}.", "Free the space or the permission.")


class VerdictError(ToolchainError):
    """A check that ran to its end and said no."""

    exit_code = 3
