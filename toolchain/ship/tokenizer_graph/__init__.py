"""A checkpoint's tokenizer as part of an ONNX graph, by onnxruntime-extensions: text in, probabilities out.

Nothing is believed: `proven` compares what the graph makes of hard texts with the checkpoint's tokenizer, token by
token, before a graph is given away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.build.onnx_metadata import PRODUCER
from toolchain.data.inputs import Encoder
from toolchain.errors import ShippingError
from toolchain.passes.probabilities import add_probabilities
from toolchain.ship.bundle_files.verify import TEXT
from toolchain.ship.tokenizer_graph.byte_pairs import byte_pairs
from toolchain.ship.tokenizer_graph.characters import WITHOUT
from toolchain.ship.tokenizer_graph.nodes import OPSET, Nodes
from toolchain.ship.tokenizer_graph.rows import Frame, Ragged, arrays
from toolchain.ship.tokenizer_graph.wordpiece import word_pieces

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 8
# Of the operators whose meaning changed from opset 18 to 20; every other one only takes more types since.
CHANGED = {"DFT", "GridSample", "AffineGrid"}

Pieces = Callable[[Nodes, "ir.Value", Any], Ragged]
# By what tokenizer.json calls the model.
PIECES: Mapping[str, Pieces] = {
    "WordPiece": word_pieces,
    "BPE": byte_pairs,
}


def token_model(encoder: Encoder, multiple: int = 1) -> ir.Model:
    """A graph from `TEXT` [texts] to the arrays the model takes, each int64 [texts, tokens], a multiple of `multiple`
    wide."""
    import onnx_ir as ir

    text, nodes, made = _tokenized(encoder, multiple)
    graph = ir.Graph([text], [], nodes=[], opset_imports=dict(OPSET), name="tokenizer")
    for name, value in made.items():
        value.name, value.shape, value.dtype = name, ir.Shape(["texts", "tokens"]), ir.DataType.INT64
        graph.outputs.append(value)
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        doc_string="A tokenizer: texts to the ids of their tokens.",
    )
    _put_first(graph, nodes)
    return model


def with_tokenizer(model: ir.Model, encoder: Encoder) -> ir.Model:
    """The model, which answers token ids with logits, from `TEXT` [texts] to logits and probabilities,
    float32 [texts, labels]; changed in place."""
    graph = model.graph
    if graph.opset_imports[""] < OPSET[""]:
        changed = sorted({node.op_type for node in graph.all_nodes() if node.domain == ""} & CHANGED)
        if changed or graph.opset_imports[""] < 18:
            raise ShippingError(
                f"The graph is of opset {graph.opset_imports['']}{' with ' + changed[0] if changed else ''}, and a "
                f"tokenizer needs {OPSET['']}.",
                "Export the model again.",
            )
    text, nodes, made = _tokenized(encoder, 1)
    for value in list(graph.inputs):
        value.replace_all_uses_with(made[value.name or ""])
    graph.inputs[:] = [text]
    add_probabilities(model, encoder.multi_label)
    _put_first(graph, nodes)
    graph.opset_imports.update({**OPSET, "": max(OPSET[""], graph.opset_imports[""])})
    return model


def _tokenized(encoder: Encoder, multiple: int) -> tuple[ir.Value, Nodes, dict[str, ir.Value]]:
    import onnx_ir as ir

    kind = json.loads(encoder.tokenizer.to_str())["model"].get("type")
    if kind not in PIECES:
        raise ShippingError(f"onnxruntime-extensions has no tokenizer of the kind {kind}.", WITHOUT)
    text = ir.Value(name=TEXT, shape=ir.Shape(["texts"]), type=ir.TensorType(ir.DataType.STRING))
    nodes = Nodes()
    tokens = PIECES[kind](nodes, text, encoder.tokenizer)
    return text, nodes, arrays(nodes, tokens, _frame(encoder, multiple), encoder.names)


def _frame(encoder: Encoder, multiple: int) -> Frame:
    """What the tokenizer puts around a text, which is what it makes of one that it does not of the bare text."""
    tokenizer = encoder.tokenizer
    whole, bare = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    before = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
    if before is None:
        raise ShippingError("The tokenizer changes a text where it puts special tokens around it.", WITHOUT)
    after = whole[before + len(bare) :]
    return Frame(whole[:before], after, encoder.pad_id, encoder.max_length, multiple)


def _put_first(graph: ir.Graph, nodes: Nodes) -> None:
    """The nodes before all others, under names of their own."""
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
