"""Exports, optimises, validates, compares and ships fine-tuned text classifiers as ONNX models.

`import toolchain` is fast: the names of the Python interface load their modules when they are first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.interface import (
        Artifact,
        Bundle,
        Classifier,
        Comparison,
        Model,
        Plot,
        Prediction,
        Result,
        ToolchainError,
        VariantState,
        open,
        read_result,
        verify,
    )

# ONNX Runtime reports its use to Microsoft by default. It reads this variable once, when it is imported; a user may set
# another value.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
# The public names. CHANGELOG.md announces a change of one of them; see docs/reference/python.md for the rule.
__all__ = [
    "Artifact",
    "Bundle",
    "Classifier",
    "Comparison",
    "Model",
    "Plot",
    "Prediction",
    "Result",
    "ToolchainError",
    "VariantState",
    "open",
    "read_result",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Returns a name of the interface, and loads its module (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module("toolchain.interface"), name)
    return value


def __dir__() -> list[str]:
    """Returns the names of the module, also those that are not loaded yet."""
    return sorted({*globals(), *__all__})
