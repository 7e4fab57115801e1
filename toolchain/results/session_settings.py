"""Names, bounds and default values of the settings with which an app runs a model in ONNX Runtime.

This module is the one definition of the names. A session file and ``bundle.json`` store the settings under these names.
`toolchain.backends.ort` and the runners in bundles translate them to options of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from toolchain.system.decoding import Check, strict

MAX_THREADS, MAX_BATCH_SIZE = 1024, 4096
SHORTEST = 16  # smallest length to which fixed padding pads a text, in tokens
FIXED: Final = "fixed"  # a value of `AppSettings.padding`


def _check_threads(count: int) -> int:
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"the number is not from 1 to {MAX_THREADS}")
    return count


def _check_batch_size(count: int) -> int:
    if not 1 <= count <= MAX_BATCH_SIZE:
        raise ValueError(f"the number is not from 1 to {MAX_BATCH_SIZE}")
    return count


Threads = Annotated[int, Check(_check_threads)]
BatchSize = Annotated[int, Check(_check_batch_size)]


@strict
@dataclass(frozen=True)
class SessionSettings:
    """Settings of a session of ONNX Runtime, without its threads; the default values are those of the toolchain.

    Attributes:
        spinning: Whether idle threads keep their processors busy for a short time, to start faster.
        execution_mode: Whether the operators of a graph run one after another, or several at the same time.
        inter_op_threads: Number of operators that run at the same time if `execution_mode` is ``parallel``.
        graph_optimization: The optimisations of the graph that ONNX Runtime applies when it loads a model.
        memory_arena: Whether the session keeps the memory of finished calls for later calls.
        memory_pattern: Whether the session plans the memory of a call from earlier calls of the same shape.
    """

    spinning: bool = True
    execution_mode: Literal["sequential", "parallel"] = "sequential"
    inter_op_threads: Threads = 1
    graph_optimization: Literal["basic", "extended", "all"] = "all"
    memory_arena: bool = True
    memory_pattern: bool = True


DEFAULT = SessionSettings()


@strict
@dataclass(frozen=True)
class AppSettings:
    """Settings with which an app runs a model.

    Attributes:
        threads: Number of threads within an operator.
        session: The other settings of the session.
        batch_size: Number of texts in a batch; None if the settings do not concern batches.
        padding: Length to which an app pads a batch: ``longest`` is the length of its longest text, and ``fixed`` the
            next power of two, at least `SHORTEST`.
    """

    threads: Threads
    session: SessionSettings = DEFAULT
    batch_size: BatchSize | None = None
    padding: Literal["longest", "fixed"] = "longest"

    def summary(self, default: AppSettings) -> str:
        """Returns the settings that differ from `default`, as text; the word ``default`` if none differs."""
        names = ("threads", "batch_size", "padding")
        values = {name: (getattr(self, name), getattr(default, name)) for name in names}
        for name, value in vars(self.session).items():
            values[name] = value, getattr(default.session, name)
        changes = [f"{name}={_format(new)}" for name, (new, old) in values.items() if new != old]
        return ", ".join(changes) or "default"


def _format(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def fixed_width(tokens: int, max_length: int) -> int:
    """Returns the length to which fixed padding pads a batch.

    Args:
        tokens: Number of tokens of the longest text of the batch.
        max_length: Largest number of tokens of a text.
    """
    return max(tokens, min(max_length, max(SHORTEST, 1 << (tokens - 1).bit_length())))
