"""The Python interface: `import toolchain` offers the names of this room, and loads it when a name is first used."""

from __future__ import annotations

from toolchain.artifacts.store import Artifact
from toolchain.build.states import VariantState
from toolchain.compare.report.plots import Plot
from toolchain.errors import ToolchainError
from toolchain.interface.bundle import Bundle, verify
from toolchain.interface.classifier import Classifier
from toolchain.interface.model import Model, open
from toolchain.interface.result import Comparison, Result, read_result
from toolchain.predict import Prediction

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
