"""Tests of the column that says which exit each text uses."""

import numpy as np
import onnx_ir as ir
import pytest
from exit_graphs import add_exits, expected_logits, make_head, open_model

from toolchain import passes
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import GraphError
from toolchain.exits.use import find_exits
from toolchain.passes.exit_numbers import add_exit_numbers

TEXTS = ["a charming film", "", "a waste of two hours , and of a good cast", "Café naïve, isn't it?", "no", "yes !"]


@pytest.mark.parametrize("several_labels", [False, True])
@pytest.mark.parametrize("variant", ["onnx-std", "onnx-fp32"])
def test_each_text_gets_the_number_of_its_exit(built_tiny, variant, several_labels):
    path = built_tiny.path(variant) / "model.onnx"
    encoder = Encoder.open(path.parent, ("input_ids", "attention_mask"), 512)
    heads = [make_head(layer, 0.8 if several_labels else 0.95, several_labels) for layer in (0, 1)]
    rows = encoder.encode(TEXTS)
    batch = pad(rows, encoder.names, encoder.pad_id)
    passes_first = expected_logits(path, heads[:1], batch)[1]
    passes_all = expected_logits(path, heads, batch)[1]
    expected = passes_first.astype(int) + passes_all
    assert len(set(expected)) > 1, "the random heads must be confident for some texts only"
    model = add_exits(path, *heads)
    logits = open_model(model).run(None, batch)[0]
    # As in a file, the branches of the copy hold their own weights.
    copy = ir.from_proto(ir.to_proto(model))
    assert add_exit_numbers(copy) == 2
    numbered = open_model(copy).run(None, batch)[0]
    assert numbered[:, -1].tolist() == expected.tolist()
    assert np.array_equal(numbered[:, :-1], logits)
    assert find_exits(model, rows, encoder, threads=1) == expected.tolist()


def test_a_graph_without_exits_has_no_exit_numbers(built_tiny):
    model = passes.read(built_tiny.path("onnx-fp32") / "model.onnx")
    with pytest.raises(GraphError, match="has no exits"):
        add_exit_numbers(model)


def test_other_branches_are_refused(built_tiny):
    model = add_exits(built_tiny.path("onnx-fp32") / "model.onnx", make_head(1))
    (node,) = [node for node in model.graph if node.op_type == "If"]
    branch = node.attributes["else_branch"].as_graph()
    merge = branch.outputs[0].producer()
    other = ir.node("Identity", [merge.inputs[0]])
    branch.append(other)
    branch.outputs[0] = other.outputs[0]
    with pytest.raises(GraphError, match="has no exits of the toolchain"):
        add_exit_numbers(model)
