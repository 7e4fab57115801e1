"""Bounds of the settings in a recipe, in the words of JSON Schema; the reader and the published schema use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Any

from toolchain.artifacts.names import METHODS
from toolchain.artifacts.steps import OPTIMIZE_PASSES, QUANTIZE_PASSES, QUANTIZED, STEP_TYPES
from toolchain.exporters import EXPORTERS

Bound = Mapping[str, Any]


def _range(minimum: float, maximum: float) -> Bound:
    return {"minimum": minimum, "maximum": maximum}


def _choice(*values: str) -> Bound:
    return {"enum": list(dict.fromkeys(values))}


_SEED, _ROWS, _LAYERS = _range(0, 2**32 - 1), _range(1, 10**9), _range(1, 1000)
BOUNDS: Mapping[str, Mapping[str, Bound]] = {
    "import": {},
    "prune": {
        "ratio": _range(0.01, 0.99),
        "method": _choice(*METHODS),
        "cost": _choice("parameters", "latency"),
        "layers": _LAYERS,
        "sentences": _ROWS,
        "seed": _SEED,
        "embedding_rank": _range(1, 65536),
    },
    "recover": {
        "epochs": _range(1, 999_999),
        "learning_rate": _range(1e-9, 1),
        "batch_size": _range(1, 65536),
        "pairs": _range(0, 1000),
        "masked": _range(0, 1),
        "seed": _SEED,
        "exits": _range(0, 1000),
    },
    "export": {"opset": _range(17, 20), "exporter": _choice(*EXPORTERS)},
    "optimize": {
        "provider": _choice(*OPTIMIZE_PASSES),
        "passes": {"items": _choice(*chain(*OPTIMIZE_PASSES.values()))},
    },
    "quantize": {
        "backend": _choice(*QUANTIZED),
        "scheme": _choice(*chain(*QUANTIZED.values())),
        "embeddings": _choice("int8", "int4"),
        "keep_fp32": _LAYERS,
        "passes": {"items": _choice(*chain(*QUANTIZE_PASSES.values()))},
    },
    "exits": {
        "layers": {"items": _range(0, 1000)},
        "max_drop": _range(0, 100),
        "sentences": _ROWS,
        "pairs": _range(0, 1000),
        "seed": _SEED,
    },
    "compile": {},
}


def setting_names(step: str) -> list[str]:
    """Returns the settings that a recipe can state for a step.

    The tables ``model`` and ``training`` state the checkpoint of an import and the training data of all steps.
    """
    if step == "import":
        return []
    return [entry.name for entry in dataclasses.fields(STEP_TYPES[step]) if entry.name != "train"]


def bound_fault(step: str, key: str, value: Any) -> str:
    """Returns the fault of a setting's value; empty if the value is within its bounds, or if it has no bounds."""
    return _fault(BOUNDS[step].get(key, {}), value)


def _fault(bound: Bound, value: Any) -> str:
    if "items" in bound and isinstance(value, list):
        return next((fault for item in value if (fault := _fault(bound["items"], item))), "")
    if "enum" in bound and value not in bound["enum"]:
        return f"is {str(value)[:80]!r}, which is none of {', '.join(bound['enum'])}"
    if "minimum" in bound and isinstance(value, int | float) and not bound["minimum"] <= value <= bound["maximum"]:
        return f"is {str(value)[:80]}, which is not from {bound['minimum']:g} to {bound['maximum']:g}"
    return ""
