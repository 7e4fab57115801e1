"""Adds a checkpoint's tokenizer to an ONNX graph, with operators of onnxruntime-extensions.

Before `ship` writes a bundle, the module `comparison` checks on difficult texts that the graph and the checkpoint's
tokenizer give equal tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.build.onnx_metadata import PRODUCER
from toolchain.data.encoding import Encoder
from toolchain.errors import ShippingError
from toolchain.passes.probabilities import add_probabilities
from toolchain.ship.bundle_files.verify import TEXT
from toolchain.ship.tokenizer_graph.byte_pairs import byte_pairs
from toolchain.ship.tokenizer_graph.characters import SHIP_WITHOUT_HINT
from toolchain.ship.tokenizer_graph.model_inputs import Frame, Ragged, add_model_inputs
from toolchain.ship.tokenizer_graph.nodes import OPSET, Nodes
from toolchain.ship.tokenizer_graph.wordpiece import word_pieces

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 8
# Operators whose meaning changed between opset 18 and 20. Every standard operator outside
# `CHANGED_OPERATORS` means the same in opset 20 as in opset 18, but may accept more data types in opset 20.
CHANGED_OPERATORS = {"DFT", "GridSample", "AffineGrid"}

Pieces = Callable[[Nodes, "ir.Value", Any], Ragged]
# Maps the type of the tokenizer's model in tokenizer.json to the function that adds the tokenizer's nodes.
PIECES: Mapping[str, Pieces] = {
    "WordPiece": word_pieces,
    "BPE": byte_pairs,
}


def token_model(encoder: Encoder, multiple: int = 1) -> ir.Model:
    """Returns a graph that converts the input `TEXT` to the classifier's inputs, each int64 of shape [texts, tokens].

    Args:
        encoder: The checkpoint's tokenizer.
        multiple: The graph rounds the inputs' width up to a multiple of this number, at most to `max_length`.

    Raises:
        ShippingError: An ONNX graph cannot express the tokenizer.
    """
    import onnx_ir as ir

    text, nodes, inputs = _add_tokenizer(encoder, multiple)
    graph = ir.Graph([text], [], nodes=[], opset_imports=dict(OPSET), name="tokenizer")
    for name, value in inputs.items():
        value.name, value.shape, value.dtype = name, ir.Shape(["texts", "tokens"]), ir.DataType.INT64
        graph.outputs.append(value)
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        doc_string="A tokenizer: it converts texts to token ids.",
    )
    _insert_before_model(graph, nodes)
    return model


def with_tokenizer(model: ir.Model, encoder: Encoder) -> ir.Model:
    """Puts the tokenizer before a model, in place.

    With the tokenizer, the model computes logits and probabilities from the input `TEXT` of shape [texts].

    Args:
        model: A model that computes logits from token ids.
        encoder: The checkpoint's tokenizer.

    Returns:
        The same model; its logits and probabilities are float32 of shape [texts, labels].

    Raises:
        ShippingError: An ONNX graph cannot express the tokenizer, or the model's opset is too old.
    """
    graph = model.graph
    if graph.opset_imports[""] < OPSET[""]:
        changed = sorted({node.op_type for node in graph.all_nodes() if node.domain == ""} & CHANGED_OPERATORS)
        if changed or graph.opset_imports[""] < 18:
            opset = f"opset {graph.opset_imports['']}"
            feature = f"{changed[0]} of {opset}" if changed else opset
            raise ShippingError(
                f"The model uses {feature}, but a tokenizer needs opset {OPSET['']}.",
                "Export the model again.",
            )
    text, nodes, inputs = _add_tokenizer(encoder, 1)
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[value.name or ""])
    graph.inputs[:] = [text]
    add_probabilities(model, encoder.task)
    _insert_before_model(graph, nodes)
    graph.opset_imports.update({**OPSET, "": max(OPSET[""], graph.opset_imports[""])})
    return model


def _add_tokenizer(encoder: Encoder, multiple: int) -> tuple[ir.Value, Nodes, dict[str, ir.Value]]:
    import onnx_ir as ir

    kind = json.loads(encoder.tokenizer.to_str())["model"].get("type")
    if kind not in PIECES:
        raise ShippingError(
            f"A graph can contain a tokenizer of type {' or '.join(PIECES)}, but no tokenizer of type {kind}.",
            SHIP_WITHOUT_HINT,
        )
    text = ir.Value(name=TEXT, shape=ir.Shape(["texts"]), type=ir.TensorType(ir.DataType.STRING))
    nodes = Nodes()
    tokens = PIECES[kind](nodes, text, encoder.tokenizer)
    return text, nodes, add_model_inputs(nodes, tokens, _frame(encoder, multiple), encoder.names)


def _frame(encoder: Encoder, multiple: int) -> Frame:
    """Returns the tokenizer's special tokens, its padding token, and the largest number of tokens in a text.

    To find the special tokens, the function encodes the text "a" twice: with special tokens, and without.
    """
    tokenizer = encoder.tokenizer
    ids, text = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    start = next((i for i in range(len(ids)) if text and ids[i : i + len(text)] == text), None)
    if start is None:
        raise ShippingError(
            "The tokenizer changes the tokens of a text when it adds special tokens.", SHIP_WITHOUT_HINT
        )
    return Frame(ids[:start], ids[start + len(text) :], encoder.pad_id, encoder.max_length, multiple)


def _insert_before_model(graph: ir.Graph, nodes: Nodes) -> None:
    """Inserts the tokenizer's nodes before all other nodes of the graph, and gives them unique names."""
    tape = nodes.tape
    for index, node in enumerate(tape.nodes):
        node.name = f"tokenizer/{index}/{node.op_type}"
        for number, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{number}"
    for value in tape.initializers:
        graph.register_initializer(value)
    if len(graph):
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.extend(tape.nodes)
