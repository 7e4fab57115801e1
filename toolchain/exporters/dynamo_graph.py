"""Simplification of the graphs of PyTorch's exporter "dynamo" to the patterns that the passes recognise."""

from __future__ import annotations

import ast
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Metadata of a node: the paths of the modules around PyTorch's operator, and the operator's name.
MODULES = "pkg.torch.onnx.name_scopes"
# Products of weights stay in the graph: int8 quantises them, and their results need more bytes than the weights.
KEPT = ("MatMul", "Gemm", "LayerNormalization")


def simplify(model: ir.Model) -> None:
    """Names nodes after PyTorch's modules, stores transposed weights, and removes superfluous nodes and metadata.

    The function changes the model in place. The result has no metadata, because metadata contains the paths of source
    files on this machine. The result has no shapes inside the graph, because passes would make these shapes wrong.
    """
    import onnx
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    _name_transposes(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)  # layers that share a weight then share its transpose
    optimizer.fold_constants(model, should_fold=_should_fold)
    simplifications = [
        rules.collapse_slice_rule,
        rules.mul_by_1_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
    ]
    rewriter.rewrite(model, simplifications)
    common.IdentityEliminationPass()(model)  # some rewrites put an Identity into the place of the removed nodes
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _write_sizes_as_tracing(model)
    _add_biases(model)
    _name_nodes(model)
    _remove_attachments(model)
    common.NameFixPass()(model)
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    )


def _name_transposes(model: ir.Model) -> None:
    """Names the transpose of each weight after the weight, because the graph will store the transpose instead."""
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer():
            node.outputs[0].name = f"{weight.name}/transposed"


def _write_sizes_as_tracing(model: ir.Model) -> None:
    """Reads the batch size and the sequence length with the operators of the tracing exporter.

    For CUDA, ONNX Runtime fuses embeddings only if these operators read the number of positions from the first input,
    the token ids. All inputs have the same shape.
    """
    import numpy as np

    from toolchain.passes.graph import constant

    for node in list(model.graph):
        shape = node.inputs[0].producer() if node.op_type == "Squeeze" and node.inputs[0] else None
        if shape is None or shape.op_type != "Shape" or shape.inputs[0] not in model.graph.inputs:
            continue
        if len(shape.outputs[0].consumers()) > 1:
            continue
        axis = shape.attributes.get_int("start", 0)
        shape.attributes.clear()
        shape.replace_input_with(0, model.graph.inputs[0])
        node.op_type = "Gather"
        node.resize_inputs(2)
        node.replace_input_with(1, constant(model, f"axis_{axis}", np.array(axis, np.int64)))
        for reader in node.outputs[0].consumers():
            if reader.op_type == "Reshape":  # turns the size into a vector of one element
                reader.op_type = "Unsqueeze"
                reader.attributes.clear()
                reader.replace_input_with(1, constant(model, "first_axis", np.array([0], np.int64)))


def _add_biases(model: ir.Model) -> None:
    """Adds a bias of zero to each LayerNormalization without one, because ONNX Runtime's fusions for CUDA read it."""
    import numpy as np

    from toolchain.passes.graph import array_of, constant

    for node in model.graph:
        if node.op_type == "LayerNormalization" and len(node.inputs) == 2:
            zeros = np.zeros_like(array_of(node.inputs[1]))
            node.resize_inputs(3)
            node.replace_input_with(2, constant(model, f"zeros_{len(zeros)}", zeros))


def _name_nodes(model: ir.Model) -> None:
    """Names each node after its module and operator, such as ``/bert/pooler/dense/MatMul``, as other exporters do.

    A number follows the name of a linear layer that the model calls again, as in ``/ffn_1/MatMul``.
    """
    calls = Counter[str]()
    for node in model.graph:
        if MODULES not in node.metadata_props:  # onnxscript added the node and named it
            continue
        root, *paths, operator = ast.literal_eval(node.metadata_props[MODULES])
        # Paths of modules begin with the path of the model, which is empty. The sizes of inputs belong to no module.
        module = "".join(f"/{name}" for name in _relative_names([] if root else paths))
        name = f"{module}/{node.op_type}"
        is_repeated = operator.startswith("linear") and calls[name]
        node.name = f"{module}_{calls[name]}/{node.op_type}" if is_repeated else name
        calls[name] += 1


def _relative_names(paths: list[str]) -> list[str]:
    """Returns the name of each module relative to the module around it: ``a, a.b.c`` gives ``a, b.c``."""
    parents = ["", *paths]
    return [path.removeprefix(f"{parent}.") for parent, path in zip(parents, paths, strict=False)]


def _should_fold(node: ir.Node) -> bool | None:
    """Returns whether to compute a node with constant inputs now; None leaves the choice to onnxscript."""
    if node.op_type in KEPT:
        return False
    return True if node.op_type == "Transpose" else None


def _remove_attachments(model: ir.Model) -> None:
    """Removes metadata, the shapes of values inside the graph, and the attribute ``allowzero``.

    With ``allowzero``, a size of 0 in the target shape of a Reshape means 0. Batches and sentences are never empty, and
    some execution providers of ONNX Runtime refuse this attribute.
    """
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    nodes = list(model.graph)
    inner_values = [value for node in nodes for value in node.outputs if not value.is_graph_output()]
    edge_values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for value in inner_values:
        value.shape = value.type = None
    model.metadata_props.clear()
    for value in (*inner_values, *edge_values):
        value.metadata_props.clear()
    for node in nodes:
        node.attributes.pop("allowzero", None)
