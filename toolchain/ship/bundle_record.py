"""The content of bundle.json that this toolchain uses, with bounds: whatever decodes is safe to use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.data.entities import check_names
from toolchain.data.labels import MULTI, REGRESSION, SINGLE, TASKS, TOKENS
from toolchain.results.session_settings import AppSettings
from toolchain.ship.bundle_files.verify import LOGITS, TEXT
from toolchain.system.decoding import Line, convert, partial

# The name of a variant or a target: a message shows it, so it is printable and short.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,199}")


@partial
@dataclass(frozen=True)
class FileRecord:
    """A file of a bundle: its path relative to the folder, and its size in bytes."""

    path: str
    bytes: int


@partial
@dataclass(frozen=True)
class TensorRecord:
    """An input or output of a model: its name, and its shape with names for the dynamic axes."""

    name: str
    shape: tuple[int | str | None, ...]


@partial
@dataclass(frozen=True)
class ModelRecord:
    """A model in a bundle.

    Attributes:
        variant: Name of the variant.
        file: Path of the model file in the bundle.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        app_settings: Settings with which an app runs the model, from a session file; None without them.
    """

    variant: str
    file: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    app_settings: AppSettings | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.variant):
            raise ValueError(f"{self.variant[:20]!r} is not the name of a variant")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{self.variant} has two inputs of one name")

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the inputs."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def takes_texts(self) -> bool:
        """Returns whether the graph contains the tokenizer."""
        return self.names == (TEXT,)


@partial
@dataclass(frozen=True)
class OriginRecord:
    """The origin of the models: the name of the model."""

    name: Line


@partial
@dataclass(frozen=True)
class BundleRecord:
    """A bundle that `read_bundle` of verify.py accepted; see the table of its fields in docs/reference/artifacts.md.

    Attributes:
        task: Task of the models; None in a bundle of an older toolchain, which has only `multi_label`.
    """

    id: str
    target: str
    labels: tuple[str, ...]
    max_length: int
    pad_id: int
    models: tuple[ModelRecord, ...]
    files: tuple[FileRecord, ...]
    model: OriginRecord = OriginRecord("unnamed")
    multi_label: bool = False
    task: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.target):
            raise ValueError(f"{self.target[:20]!r} is not the name of a target")
        if not all(self.labels) or len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is empty, or has the same name as another label")
        if self.task_name not in TASKS:
            raise ValueError(f"the task {self.task_name[:20]!r} is unknown")
        if (len(self.labels) == 1) != (self.task_name == REGRESSION):
            raise ValueError(f"the number of labels does not fit the task {self.task_name}")
        if self.task_name == TOKENS and (fault := check_names(self.labels)):
            raise ValueError(f"the labels cannot mark entities: {fault[:80]}")
        for model in self.models:
            if model.takes_texts and self.task_name == TOKENS:
                raise ValueError(f"{model.variant} takes texts, so it cannot return a label for each token")
            shape = next(tensor.shape for tensor in model.outputs if tensor.name == LOGITS)
            if shape and isinstance(shape[-1], int) and shape[-1] != len(self.labels):
                raise ValueError(f"{model.variant} returns {shape[-1]} logits for {len(self.labels)} labels")

    @property
    def task_name(self) -> str:
        """Returns the task of the models, one of `toolchain.data.labels.TASKS`."""
        return self.task or (MULTI if self.multi_label else SINGLE)

    @property
    def size_bytes(self) -> int:
        """Returns the total size of the files that bundle.json lists."""
        return sum(file.bytes for file in self.files)


def decode_record(body: Mapping[str, Any]) -> BundleRecord:
    """Returns the record of a bundle.json that `read_bundle` of verify.py accepted.

    Raises:
        ValueError: A field is missing, has a wrong type or a wrong value.
    """
    return convert(BundleRecord, body)
