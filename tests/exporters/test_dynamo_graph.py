"""Tests that graphs of the exporter dynamo become simpler: node names, transposed weights, sizes and metadata."""

import numpy as np
import onnx_ir as ir
import pytest

from toolchain import exporters
from toolchain.exporters.dynamo_graph import MODULES, simplify

pytestmark = pytest.mark.skipif(
    bool(exporters.unmet_requirement("dynamo")), reason=exporters.unmet_requirement("dynamo")
)


class Recorder:
    """Builds a graph with the metadata of PyTorch's exporter.

    Attributes:
        nodes: The nodes in the order of their creation.
        weights: The stored weights and constants.
    """

    def __init__(self):
        self.nodes, self.weights = [], []
        self.inputs = [
            ir.val(name, dtype=ir.DataType.FLOAT, shape=("batch_size", "sequence_length", 4)) for name in ("x", "z")
        ]

    def weight(self, name, array):
        self.weights.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.weights[-1]

    def add(self, operator, inputs, modules, **attributes):
        """Adds a node; `modules` are the paths of the modules around it and the name of PyTorch's operator."""
        node = ir.node(operator, inputs, attributes, name=f"node_{len(self.nodes)}")
        node.metadata_props.update({MODULES: repr(modules), "pkg.torch.onnx.stack_trace": "/home/someone/model.py"})
        node.outputs[0].name = f"value_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, data, weight, modules):
        return self.add("MatMul", [data, self.add("Transpose", [weight], modules, perm=[1, 0])], modules)

    def simplified(self, result):
        result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape(("batch_size", None, None))
        graph = ir.Graph(self.inputs, [result], nodes=self.nodes, initializers=self.weights, opset_imports={"": 18})
        model = ir.Model(graph, ir_version=10)
        simplify(model)
        return model


WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def test_a_repeated_layer_stores_its_transposed_weight_once_and_gets_numbered_names():
    recorder = Recorder()
    weight = recorder.weight("a.b.0.weight", WEIGHT)
    scopes = ["", "a", "a.b.0"]
    hidden = recorder.linear(recorder.inputs[0], weight, [*scopes, "linear"])
    hidden = recorder.add("Identity", [hidden], [*scopes[:2], "clone"])
    model = recorder.simplified(recorder.linear(hidden, weight, [*scopes, "linear_1"]))
    assert [node.name for node in model.graph] == ["/a/b.0/MatMul", "/a/b.0_1/MatMul"]
    assert list(model.graph.initializers) == ["a.b.0.weight/transposed"]
    assert np.array_equal(model.graph.initializers["a.b.0.weight/transposed"].const_value.numpy(), WEIGHT.T)


def test_products_of_weights_are_not_folded():
    recorder = Recorder()
    table = recorder.weight("table", WEIGHT)
    positions = recorder.linear(table, recorder.weight("weight", WEIGHT), ["", "linear"])
    model = recorder.simplified(recorder.add("Add", [recorder.inputs[0], positions], ["", "add"]))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def test_sizes_are_read_from_the_first_input_as_tracing_does():
    recorder = Recorder()
    length = recorder.add(
        "Squeeze", [recorder.add("Shape", [recorder.inputs[1]], ["none", "s"], start=1, end=2)], ["none", "s"]
    )
    vector = recorder.add("Reshape", [length, recorder.weight("all", np.array([-1]))], ["", "a", "view"])
    shape = recorder.add("Concat", [recorder.weight("rows", np.array([-1])), vector], ["", "a", "view"], axis=0)
    result = recorder.add("Reshape", [recorder.inputs[0], shape], ["", "a", "view"], allowzero=1)
    model = recorder.simplified(result)
    assert [node.op_type for node in model.graph] == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]
    assert [node.name for node in model.graph] == ["/Shape", "/Gather", "/a/Unsqueeze", "/a/Concat", "/a/Reshape"]
    first, gather, *_, last = model.graph
    assert first.inputs[0].name == "x"
    assert gather.inputs[1].const_value.numpy() == 1
    assert not last.attributes
    assert not any(node.metadata_props or node.doc_string for node in model.graph)


def test_two_transpositions_become_one():
    recorder = Recorder()
    once = recorder.add("Transpose", [recorder.inputs[0]], ["", "transpose"], perm=[0, 2, 1])
    model = recorder.simplified(recorder.add("Transpose", [once], ["", "transpose_1"], perm=[1, 0, 2]))
    (node,) = model.graph
    assert list(node.attributes["perm"].as_ints()) == [2, 0, 1]
    assert node.name == "/Transpose"


def test_normalisations_without_a_bias_share_a_bias_of_zero():
    recorder = Recorder()
    scale = recorder.weight("scale", np.ones(4, np.float32))
    once = recorder.add("LayerNormalization", [recorder.inputs[0], scale], ["", "norm", "layer_norm"])
    model = recorder.simplified(recorder.add("LayerNormalization", [once, scale], ["", "norm", "layer_norm_1"]))
    first, second = (node.inputs[2] for node in model.graph)
    assert first is second
    assert np.array_equal(first.const_value.numpy(), np.zeros(4, np.float32))
