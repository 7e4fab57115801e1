"""Finds the exit that each text uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.backends import open_graph
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import Tokens
from toolchain.passes.exit_numbers import add_exit_numbers

if TYPE_CHECKING:
    import onnx_ir as ir


def find_exits(graph: ir.Model, rows: Sequence[Tokens], encoder: Encoder, threads: int) -> list[int]:
    """Runs a graph with exits on texts at batch 1; returns the number of exits that each text passes.

    A text that uses the first exit passes 0 exits. The function changes the graph.

    Args:
        graph: The graph.
        rows: The token ids of each text.
        encoder: The `Encoder` of the model, which knows the inputs of the graph.
        threads: Number of threads.

    Raises:
        GraphError: The graph has no exits.
    """
    add_exit_numbers(graph)
    with open_graph(graph, threads) as session:
        return [round(float(session.run(pad([row], encoder.names, encoder.pad_id))[0, -1])) for row in rows]
