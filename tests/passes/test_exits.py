"""Tests of the pass `exits`: each text gets the logits of its exit, alone and in any batch."""

import numpy as np
import onnx_ir as ir
import pytest
from exit_graphs import add_exits, expected_logits, make_head, open_model
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import passes
from toolchain.build.pipeline import ensure
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import GraphError
from toolchain.passes.exits import exits, layer_weights
from toolchain.passes.quantize_linear import headroom

WIDTH = 32
PRODUCTS = {"DynamicQuantizeMatMul", "QAttention", "MultiHeadAttention", "LayerNormalization"}
TEXTS = ["a charming film", "", "a waste of two hours , and of a good cast", "Café naïve, isn't it?", "no", "yes !"]


@pytest.fixture(scope="module")
def encoder(built_tiny):
    return Encoder.open(built_tiny.path("onnx-fp32"), ("input_ids", "attention_mask"), 512)


@pytest.fixture(scope="module")
def encode(encoder):
    def encode_texts(texts, left=False):
        return pad(encoder.encode(texts), encoder.names, encoder.pad_id, left)

    return encode_texts


@pytest.mark.parametrize("several_labels", [False, True])
@pytest.mark.parametrize("variant", ["onnx-std", "onnx-fp32"])
def test_each_text_gets_the_logits_of_its_exit(built_tiny, encode, variant, several_labels):
    path = built_tiny.path(variant) / "model.onnx"
    heads = [make_head(layer, 0.8 if several_labels else 0.95, several_labels) for layer in (0, 1)]
    session = open_model(add_exits(path, *heads))
    _, is_left = expected_logits(path, heads, encode(TEXTS))
    assert set(is_left) == {True, False}, "the random heads must be confident for some texts only"
    for texts in [TEXTS, *([text] for text in TEXTS), TEXTS[::-1], TEXTS[1:4]]:
        batch = encode(texts)
        np.testing.assert_allclose(session.run(None, batch)[0], expected_logits(path, heads, batch)[0], atol=1e-5)
    alone = np.concatenate([session.run(None, encode([text]))[0] for text in TEXTS])
    np.testing.assert_allclose(session.run(None, encode(TEXTS, left=False))[0], alone, atol=1e-5)


@given(
    layers=st.sets(st.integers(0, 1), min_size=1),
    confidence=st.floats(0.5, 1.0),
    seed=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=20, deadline=None)
def test_batches_of_any_texts_keep_the_logits(built_tiny, encode, layers, confidence, seed, data):
    path = built_tiny.path("onnx-fp32") / "model.onnx"
    heads = [make_head(layer, confidence, seed=seed) for layer in sorted(layers)]
    batch = encode(data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9)), data.draw(st.booleans()))
    logits = open_model(add_exits(path, *heads)).run(None, batch)[0]
    np.testing.assert_allclose(logits, expected_logits(path, heads, batch)[0], atol=1e-5)


@pytest.mark.parametrize("confidence", [0.0, 1.1])
def test_all_or_no_texts_exit(built_tiny, encode, confidence):
    path = built_tiny.path("onnx-fp32") / "model.onnx"
    head, batch = make_head(1, confidence), encode(TEXTS)
    logits = open_model(add_exits(path, head)).run(None, batch)[0]
    expected = expected_logits(path, [head], batch)[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    unchanged = open_model(passes.read(path)).run(None, batch)[0]
    assert np.allclose(logits, unchanged, atol=1e-5) == (confidence > 1)


def test_a_branch_has_its_own_weights_and_every_node_stands_once(built_tiny):
    """ONNX Runtime prepares no weight of an outer graph for the kernels of a branch."""
    path = built_tiny.path("onnx-int8") / "model.onnx"
    before, after = passes.read(path), add_exits(path, make_head(0), make_head(1))
    for graph in after.graphs():
        for weight in graph.initializers.values():
            readers = {node.graph for node in weight.consumers()}
            assert readers
            assert len(readers) > 1 or readers == {graph}
    count = sum(node.op_type in PRODUCTS for node in after.graph.all_nodes())
    assert count == sum(node.op_type in PRODUCTS for node in before.graph) > 4
    assert headroom(after) == headroom(before)
    facts, facts_before = passes.facts(after), passes.facts(before)
    assert facts["bytes_by_dtype"]["int8"] == facts_before["bytes_by_dtype"]["int8"]
    assert facts["bytes_by_part"]["embeddings"] == facts_before["bytes_by_part"]["embeddings"]


def test_layer_weights_count_the_weights_between_the_hidden_states(built_tiny):
    model = passes.read(built_tiny.path("onnx-std") / "model.onnx")
    attention, feed_forward, norms = 4 * (WIDTH + 1) * WIDTH, 2 * WIDTH * 2 * WIDTH + 3 * WIDTH, 4 * WIDTH
    classifier = (WIDTH + 1) * WIDTH + (WIDTH + 1) * 2
    first, last = layer_weights(model)
    assert first == pytest.approx(attention + feed_forward + norms, abs=20)  # and a few constants
    assert last == pytest.approx(first + classifier, abs=20)


def test_a_graph_of_opset_17_gets_exits(built_tiny, encode):
    from toolchain.artifacts.steps import Export

    artifacts = ensure(built_tiny, ["onnx-std+o17"], {"onnx-std+o17": Export(17)}, lambda line: None)
    path = artifacts["onnx-std+o17"].onnx_path
    heads, batch = [make_head(0, 0.8), make_head(1, 0.8)], encode(TEXTS)
    session = open_model(add_exits(path, *heads))
    np.testing.assert_allclose(session.run(None, batch)[0], expected_logits(path, heads, batch)[0], atol=1e-5)


def test_a_graph_without_layers_gets_no_exits():
    x, y = ir.val("input_ids", ir.DataType.FLOAT, [1]), ir.val("logits", ir.DataType.FLOAT, [1])
    model = ir.Model(
        ir.Graph([x], [y], nodes=[ir.node("Relu", [x], outputs=[y])], opset_imports={"": 18}), ir_version=9
    )
    with pytest.raises(GraphError, match="no hidden states between its layers"):
        exits(model, passes.Context(4, WIDTH, exits=(make_head(0),)))
