"""The operators that the WebGPU provider of each onnxruntime-web release computes correctly.

The file webgpu.json holds a table for each release: ``right`` lists the operators that the provider computes, ``wrong``
lists those that it takes and computes wrongly. All other operators run on the CPU, with transfers from and to the
graphics processor. `tests/ship/test_webgpu.py` compares the table of the pinned release with that release in Chromium.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.names import VariantName
from toolchain.errors import ShippingError
from toolchain.ship.targets import clients

if TYPE_CHECKING:
    import onnx_ir as ir

TABLE = Path(__file__).with_name("webgpu.json")
OPERATORS: dict[str, dict[str, list[str]]] = json.loads(TABLE.read_text(encoding="utf-8"))


def operator_key(node: ir.Node) -> str:
    """Returns the name of a node's operator in the table, such as ``Add`` or ``com.microsoft.Gelu``."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def require_supported(name: VariantName, model: ir.Model) -> None:
    """Checks that the pinned release of onnxruntime-web computes every operator of a graph on WebGPU.

    Raises:
        ShippingError: The graph has an operator that the table does not list as right.
    """
    release = clients.version(clients.RUNTIME)
    unsupported = sorted({operator_key(node) for node in model.graph.all_nodes()} - set(OPERATORS[release]["right"]))
    if unsupported:
        raise ShippingError(
            f"The WebGPU provider of onnxruntime-web {release} does not compute these operators of {name} correctly: "
            f"{', '.join(unsupported)}.",
            "Ship a variant for WebAssembly, such as onnx-int8.",
        )
