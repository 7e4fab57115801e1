"""The signature of an MLflow model: the columns of its input and of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.data.labels import REGRESSION


def columns(bundle: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the ``inputs`` and ``outputs`` of the signature, in the order of the columns.

    Args:
        bundle: Content of bundle.json without files and id.
    """
    outputs = [("score", "double")]
    if bundle["task"] != REGRESSION:
        probabilities = [(f"score_{label}", "double") for label in bundle["labels"]]
        outputs = [("label", "string"), *([] if bundle["multi_label"] else outputs), *probabilities]
    return {
        "inputs": [{"type": "string", "name": "text", "required": True}],
        "outputs": [{"type": kind, "name": name, "required": True} for name, kind in outputs],
    }
