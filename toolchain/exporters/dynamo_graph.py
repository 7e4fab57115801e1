"""Simplification of the graphs of PyTorch's exporter "dynamo" to the patterns that the passes recognise."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

MODULES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the path of each module around the node's operator
REPEATED_CALL = re.compile(r"@\d+")  # torch.export marks the second and later calls of a module
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

    _name_nodes(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)  # layers that share a weight then share its transpose
    optimizer.fold_constants(model, should_fold=_should_fold)
    simplifications = [
        rules.collapse_slice_rule,
        rules.mul_by_1_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.squeeze_reshape_1d_rule,
        rules.transpose_transpose_rule,
    ]
    rewriter.rewrite(model, simplifications)
    common.IdentityEliminationPass()(model)  # some rewrites put an Identity into the place of the removed nodes
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _remove_attachments(model)
    common.NameFixPass()(model)
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    )


def _name_nodes(model: ir.Model) -> None:
    """Names each node after its module and operator, such as ``/bert/pooler/dense/MatMul``, as other exporters do.

    The transpose of a weight gets the name of the weight with the suffix ``/transposed``.
    """
    for node in model.graph:
        root, *paths = ast.literal_eval(node.metadata_props[MODULES])
        # Paths of modules begin with the path of the model, which is empty. The sizes of inputs belong to no module.
        modules = [] if root else [REPEATED_CALL.sub("", path) for path in paths[:-1]]
        module = "/".join(_relative_names(modules))
        node.name = f"/{module}/{node.op_type}" if module else f"/{node.op_type}"
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer():
            node.outputs[0].name = f"{weight.name}/transposed"


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
