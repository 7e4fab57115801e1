"""Each rewrite on its own: it applies where it should, leaves the rest alone, and changes no answer."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from toolchain import passes
from toolchain.backends.ort import session_options
from toolchain.data.inputs import pad
from toolchain.errors import GraphError
from toolchain.passes.graph import constant, takes_first_token
from toolchain.passes.int8 import LARGEST_OF_7_BITS, quantize_weight, weight_of
from toolchain.passes.quantize_blocks import BLOCK, MAX_CODE, pack, quantize_blocks
from toolchain.passes.quantize_linear import headroom, linear_nodes
from toolchain.passes.quantize_static import Activation
from toolchain.passes.unsigned_weights import unsigned_weights

ATTENTION = passes.Context(heads=4, width=32)
NAMES = ("input_ids", "attention_mask")
ROWS = [[101, 2023, 102], [101] + [2000 + i for i in range(23)] + [102], [101]]


@pytest.fixture
def std(built_tiny):
    return passes.read(built_tiny.path("onnx-std") / "model.onnx")


def outputs(model, batch):
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(proto.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    return session.run(None, batch)


def answer(model, batch):
    return outputs(model, batch)[0]


def operators(model):
    return passes.facts(model)["operators"]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["fuse"],
        ["fuse", "residual-sum"],
        ["fuse", "residual-sum", "first-token"],
        ["fuse", "residual-sum", "first-token", "first-query"],
        ["residual-sum"],
    ],
)
def test_exact_passes_change_no_answer(std, names, left):
    batch = pad(ROWS, NAMES, 0, left)
    before = answer(std, batch)
    after, counts = passes.rewrite(std, names, ATTENTION)
    assert all(counts.values())
    assert np.abs(answer(after, batch) - before).max() < 1e-5


def test_fuse_makes_one_attention_a_layer_and_keeps_the_raw_mask(std):
    model, counts = passes.rewrite(std, ["fuse"], ATTENTION)
    assert counts == {"fuse": 4}
    assert operators(model)["Attention"] == operators(model)["Gelu"] == 2
    assert "SkipLayerNormalization" not in operators(model)
    masks = [node.inputs[3] for node in model.graph if node.op_type == "Attention"]
    assert {mask.producer().op_type for mask in masks} == {"Cast"}  # of the mask itself, not of a count of tokens


def loaded_operators(model, tmp_path):
    """What ONNX Runtime makes of the file under default options in an app that fixes the dimensions."""
    options = ort.SessionOptions()
    options.add_free_dimension_override_by_name("batch_size", 1)
    options.add_free_dimension_override_by_name("sequence_length", 25)
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]


def test_the_runtime_does_not_undo_residual_sum(std, tmp_path):
    """An A/B switch: should a release stop fusing the Add, or start fusing the Sub or the Sum, this says so."""
    without, _ = passes.rewrite(std, ["fuse"], ATTENTION)
    assert "SkipLayerNormalization" in loaded_operators(without, tmp_path)
    rewritten, _ = passes.rewrite(without, ["residual-sum"], ATTENTION)
    assert "SkipLayerNormalization" not in loaded_operators(rewritten, tmp_path)
    assert "Sum" not in operators(rewritten)
    for node in rewritten.graph:
        node.op_type = {"Sub": "Sum"}.get(node.op_type, node.op_type)
    assert "SkipLayerNormalization" not in loaded_operators(rewritten, tmp_path)


def residual(nodes, initializers):
    """x, which is [b, s, 4], + what `nodes` make of it in h, normalised."""
    last = [
        helper.make_node("Relu", ["x"], ["r"]),
        *nodes,
        helper.make_node("Add", ["h", "r"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "one"], ["y"]),
    ]
    rng = np.random.default_rng(3)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in initializers.items()}
    return small_graph(last, {**drawn, "one": np.ones(4, np.float32)}, ("b", "s", 4))


@pytest.mark.parametrize(
    ("nodes", "initializers", "form"),
    [
        ([helper.make_node("MatMul", ["r", "w"], ["h"])], {"w": (4, 4)}, "Sub"),
        (
            [helper.make_node("MatMul", ["r", "w"], ["m"]), helper.make_node("Add", ["b", "m"], ["h"])],
            {"w": (4, 4), "b": (4,)},
            "Sub",
        ),
        # Its sign is of no weight, or of one that decides more than it.
        ([helper.make_node("Tanh", ["r"], ["h"])], {}, "Sum"),
        ([helper.make_node("MatMul", ["r", "r"], ["h"])], {}, "Sum"),
        (
            [
                helper.make_node("MatMul", ["r", "w"], ["m"]),
                helper.make_node("Add", ["m", "b"], ["n"]),
                helper.make_node("Mul", ["n", "m"], ["h"]),
            ],
            {"w": (4, 4), "b": (4,)},
            "Sum",
        ),
    ],
)
def test_a_residual_is_a_difference_where_weights_have_the_sign(nodes, initializers, form):
    model = residual(nodes, initializers)
    batch = {"x": np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)}
    before = answer(model, batch)
    after, counts = passes.rewrite(model, ["residual-sum"], ATTENTION)
    assert counts == {"residual-sum": 1}
    assert operators(after)[form] == 1
    assert np.abs(answer(after, batch) - before).max() < 1e-5


def test_a_value_added_to_itself_is_no_difference():
    model = small_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "h"], ["a"]),
            helper.make_node("LayerNormalization", ["a", "one"], ["y"]),
        ],
        {"w": np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32), "one": np.ones(4, np.float32)},
        ("b", "s", 4),
    )
    batch = {"x": np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)}
    before = answer(model, batch)
    after, _ = passes.rewrite(model, ["residual-sum"], ATTENTION)
    assert np.abs(answer(after, batch) - before).max() < 1e-5


def test_weights_that_layers_share_are_negated_once():
    model = residual(
        [
            helper.make_node("MatMul", ["r", "w"], ["m"]),
            helper.make_node("Add", ["m", "r"], ["n"]),
            helper.make_node("LayerNormalization", ["n", "one"], ["l"]),
            helper.make_node("MatMul", ["l", "w"], ["h"]),
        ],
        {"w": (4, 4)},
    )
    batch = {"x": np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)}
    before = answer(model, batch)
    after, counts = passes.rewrite(model, ["residual-sum"], ATTENTION)
    assert counts == {"residual-sum": 2}
    assert sorted(after.graph.initializers) == ["one", "w/negated"]
    assert np.abs(answer(after, batch) - before).max() < 1e-5


def test_first_token_moves_above_the_last_feed_forward(std):
    model, counts = passes.rewrite(std, ["fuse", "residual-sum", "first-token"], ATTENTION)
    assert counts["first-token"] == 11
    gathers = [n for n in model.graph if n.op_type == "Gather" and n.attributes.get_int("axis", 0) == 1]
    assert sorted(n.inputs[0].producer().op_type for n in gathers) == ["Attention", "LayerNormalization"]


def test_first_token_leaves_alone_what_another_reads(std):
    model, _ = passes.rewrite(std, ["fuse"], ATTENTION)
    last = [n for n in model.graph if n.op_type == "LayerNormalization"][-1]
    model.graph.outputs.append(last.outputs[0])  # an app that also wants the hidden states
    model, counts = passes.rewrite(model, ["first-token"], ATTENTION)
    assert counts["first-token"] == 0


def small_graph(nodes, initializers, output_shape=("b", 2)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    )
    proto.ir_version = 8
    return ir.from_proto(proto)


def test_first_token_needs_a_start_it_knows_the_shape_of():
    """From a graph input nothing says that its axes are [batch, sequence, width]."""
    model = small_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Gather", ["h", "zero"], ["y"], axis=1),
        ],
        {"w": np.ones((4, 2), np.float32), "zero": np.array(0, np.int64)},
    )
    assert passes.rewrite(model, ["first-token"], ATTENTION)[1] == {"first-token": 0}


@pytest.mark.parametrize("index", [1, -1])
def test_first_token_is_about_token_zero(index):
    model = small_graph(
        [
            helper.make_node("LayerNormalization", ["x", "g"], ["n"]),
            helper.make_node("MatMul", ["n", "w"], ["h"]),
            helper.make_node("Gather", ["h", "i"], ["y"], axis=1),
        ],
        {"g": np.ones(4, np.float32), "w": np.ones((4, 2), np.float32), "i": np.array(index, np.int64)},
    )
    assert passes.rewrite(model, ["first-token"], ATTENTION)[1] == {"first-token": 0}


def test_the_last_attention_asks_for_token_0_alone(std):
    model, counts = passes.rewrite(std, ["fuse", "first-token", "first-query"], ATTENTION)
    assert counts["first-query"] == 1
    found = operators(model)
    assert (found["Attention"], found["MultiHeadAttention"]) == (1, 1)
    heads = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert (heads.inputs[3], heads.inputs[4]) == (None, None)  # a mask, which releases up to 1.20 read wrongly
    assert heads.inputs[5].producer().op_type == "Expand"  # 1.17 refuses to broadcast it, 1.20 does so wrongly
    query = heads.inputs[0].producer()
    assert query.inputs[0].producer().inputs[0].producer().op_type == "Gather"  # Add ← MatMul ← Gather
    assert not [name for name in model.graph.initializers if "Attention_1_qkv" in name]  # packed and unpacked is twice


@pytest.mark.parametrize("names", [["fuse", "first-query"], ["fuse", "first-token", "first-query"]])
def test_an_attention_that_is_read_whole_is_left_alone(std, names):
    model, _ = passes.rewrite(std, names[:-1], ATTENTION)
    for node in model.graph:
        if node.op_type == "Attention":
            model.graph.outputs.append(node.outputs[0])  # an app that also wants what was gathered
    assert passes.rewrite(model, names[-1:], ATTENTION)[1] == {"first-query": 0}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("names", [[], ["fuse"], ["fuse", "first-token", "first-query"]])
def test_padded_tokens_compute_what_the_first_does(std, names, left):
    model, _ = passes.rewrite(std, names, ATTENTION)
    batch = pad(ROWS, NAMES, 0, left)
    before = answer(model, batch)
    model, counts = passes.rewrite(model, ["padding"], ATTENTION)
    assert counts == {"padding": 1}
    norm = embedding_norm(model)
    (gather,) = norm.outputs[0].consumers()
    model.graph.outputs.append(gather.outputs[0])
    after, embeddings = outputs(model, batch)
    assert np.abs(after - before).max() < 1e-5
    mask = batch["attention_mask"].astype(bool)
    assert not mask.all()
    first = np.broadcast_to(embeddings[:, :1], embeddings.shape)
    assert np.array_equal(embeddings[~mask], first[~mask])
    assert not np.array_equal(embeddings[mask], first[mask])


def embedding_norm(model):
    return next(node for node in model.graph if node.op_type == "LayerNormalization")


def reads_what_was_mixed(model):
    norm = embedding_norm(model)
    mixed = ir.node("MatMul", [norm.inputs[0], norm.inputs[0]])
    model.graph.insert_before(norm, mixed)
    norm.replace_input_with(0, mixed.outputs[0])


def reads_no_sentence(model):
    for norm in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        norm.replace_input_with(0, norm.inputs[1])


def classifies_the_last_token(model):
    gather = next(node for node in model.graph if takes_first_token(node))
    gather.replace_input_with(1, constant(model, "last", np.array(-1, np.int64)))  # which may be padding


def has_one_attention_without_a_mask(model):
    attention = [node for node in model.graph if node.op_type in ("Attention", "Softmax")][-1]
    if attention.op_type == "Attention":
        attention.replace_input_with(3, None)
    else:
        attention.replace_input_with(0, attention.inputs[0].producer().inputs[0])


def knows_the_masks_shape_only(model):
    (mask,) = [value for value in model.graph.inputs if value.name == "attention_mask"]
    shape = ir.node("Shape", [mask])
    ones = ir.node("ConstantOfShape", [shape.outputs[0]])
    mask.replace_all_uses_with(ones.outputs[0])
    shape.replace_input_with(0, mask)
    model.graph.insert_before(next(iter(model.graph)), [shape, ones])


@pytest.mark.parametrize("names", [[], ["fuse"]])
@pytest.mark.parametrize(
    "change",
    [
        reads_what_was_mixed,
        reads_no_sentence,
        classifies_the_last_token,
        has_one_attention_without_a_mask,
        knows_the_masks_shape_only,
    ],
)
def test_no_padding_is_replaced_where_it_may_count(std, names, change):
    model, _ = passes.rewrite(std, names, ATTENTION)
    change(model)
    assert passes.rewrite(model, ["padding"], ATTENTION)[1] == {"padding": 0}


def test_padding_changes_no_int8_answer(built_tiny):
    model = passes.read(built_tiny.path("onnx-int8") / "model.onnx")
    for row in ROWS:
        alone, padded = (answer(model, pad([row], NAMES, 0, width=width)) for width in (0, 40))
        assert np.abs(padded - alone).max() < 1e-5


def test_quantised_layers_hold_int8_and_the_logits_stay_fp32(built_tiny):
    model = passes.read(built_tiny.path("onnx-fp32") / "model.onnx")
    model, counts = passes.rewrite(model, ["quantize-linear", "quantize-embedding"], ATTENTION)
    # Two layers: qkv (in the last q and kv), out, up, down each; pre_classifier. Word and position tables.
    assert counts == {"quantize-linear": 10, "quantize-embedding": 2}
    found = operators(model)
    assert (found["DynamicQuantizeMatMul"], found["QAttention"], found["Gemm"]) == (9, 1, 1)
    assert found["MultiHeadAttention"] == 1  # of one query
    assert "Attention" not in found
    assert "MatMul" not in found
    assert passes.facts(model)["bytes_by_dtype"]["int8"] > 30000 * 32


def test_quantised_answers_are_near_with_padding_on_either_side(built_tiny):
    fp32 = passes.read(built_tiny.path("onnx-fp32") / "model.onnx")
    for left in (False, True):
        batch = pad(ROWS, NAMES, 0, left)
        want = answer(fp32, batch)
        int8 = answer(passes.read(built_tiny.path("onnx-int8") / "model.onnx"), batch)
        assert np.abs(int8 - want).max() < 0.12 * np.abs(want).max()


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_becomes_a_quantised_product_with_its_bias(trans):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=trans),
            helper.make_node("Relu", ["h"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
        [
            numpy_helper.from_array(weight.T.copy() if trans else weight, "w"),
            numpy_helper.from_array(np.array([1, 2, 3], np.float32), "b"),
        ],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    )
    proto.ir_version = 8
    model, counts = passes.rewrite(ir.from_proto(proto), ["quantize-linear"], ATTENTION)
    assert counts == {"quantize-linear": 1}
    x = rng.normal(size=(5, 4)).astype(np.float32)
    want = np.maximum(x @ weight + [1, 2, 3], 0)
    assert np.abs(answer(model, {"x": x}) - want).max() < 0.1


def test_products_of_activations_stay_fp32():
    model = small_graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["x", "t"], ["p"]),
            helper.make_node("Relu", ["p"], ["y"]),
        ],
        {},
        ("b", "s", "s"),
    )
    assert passes.rewrite(model, ["quantize-linear"], ATTENTION)[1] == {"quantize-linear": 0}


weights = hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.floats(-10, 10, width=32))


@given(weights, st.sampled_from([0, 1]), st.sampled_from([127, LARGEST_OF_7_BITS]))
def test_int8_weights_are_within_half_a_step(weight, axis, most):
    int8, scale = quantize_weight(weight, axis, most)
    assert int8.dtype == np.int8
    assert np.abs(int8.astype(int)).max() <= most
    assert scale.shape == (weight.shape[axis],)
    assert (scale > 0).all()
    steps = scale[:, None] if axis == 0 else scale[None, :]
    assert (np.abs(int8 * steps - weight) <= steps * 0.5001 + 1e-30).all()


def added_in_16_bits(activations, weights):
    """What x86 without VNNI does to U8 × S8 (vpmaddubsw): neighbouring products are added in 16 bits and clipped."""
    products = activations.astype(np.int32)[:, :, None] * weights.astype(np.int32)[None]
    pairs = products.reshape(len(activations), -1, 2, weights.shape[1]).sum(axis=2)
    return np.clip(pairs, -32768, 32767).sum(axis=1)


@given(
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-10, 10, width=32)),
    hnp.arrays(np.uint8, (4, 8)),
)
def test_weights_of_7_bits_never_saturate(weight, activations):
    int8, _ = quantize_weight(weight, 1, LARGEST_OF_7_BITS)
    exact = activations.astype(np.int32) @ int8.astype(np.int32)
    assert (added_in_16_bits(activations, int8) == exact).all()


@given(hnp.arrays(np.int8, (4, 2), elements=st.integers(-127, 127)), st.permutations(range(4)))
def test_headroom_is_that_of_the_worst_pair_a_kernel_may_add(weight, order):
    """By trying every pair with the largest activation; at least 1 exactly where none is clipped."""
    model = small_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"]),
            helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
        ],
        {"w": weight},
    )
    found = headroom(model)
    full = np.full((1, 4), 255, np.uint8)
    column_safe = []
    for column in weight.T:
        for i in range(4):
            for j in range(i):
                for signed in (
                    np.maximum,
                    np.minimum,
                ):  # only weights of one sign add up; activations of others may be 0
                    pair = signed(column[[i, j]].astype(np.int32), 0)
                    column_safe.append(abs(int(pair.sum()) * 255) <= 32767)
    assert (found >= 1) == all(column_safe)
    if found >= 1:
        assert (
            added_in_16_bits(full, weight[list(order)]) == full.astype(np.int32) @ weight[list(order)].astype(np.int32)
        ).all()


def test_a_portable_graph_has_headroom_and_answers_alike(built_tiny):
    fp32 = passes.read(built_tiny.path("onnx-fp32") / "model.onnx")
    batch = pad(ROWS, NAMES, 0)
    want = answer(fp32, batch)
    model, counts = passes.rewrite(fp32, ["quantize-linear-portable", "quantize-embedding"], ATTENTION)
    assert counts == {"quantize-linear-portable": 10, "quantize-embedding": 2}
    assert passes.facts(model)["int8_headroom"] >= 1
    assert np.abs(answer(model, batch) - want).max() < 0.1 * np.abs(want).max()
    full = passes.facts(passes.read(built_tiny.path("onnx-int8") / "model.onnx"))
    assert 0.5 <= full["int8_headroom"] < 1
    assert "int8_headroom" not in passes.facts(passes.read(built_tiny.path("onnx-std") / "model.onnx"))


@pytest.mark.parametrize("left", [False, True])
def test_int8_of_standard_operators_has_no_others(std, left):
    batch = pad(ROWS, NAMES, 0, left)
    want = answer(std, batch)
    model, counts = passes.rewrite(std, ["quantize-linear-std", "quantize-embedding"], ATTENTION)
    # Query, key, value, out, up, down twice, and pre_classifier; the logits stay fp32.
    assert counts == {"quantize-linear-std": 13, "quantize-embedding": 2}
    found = operators(model)
    assert found["MatMulInteger"] == 13
    assert found["DynamicQuantizeLinear"] == 9  # query, key and value read one
    assert {node.domain for node in model.graph} == {""}
    assert np.abs(answer(model, batch) - want).max() < 0.1 * np.abs(want).max()


tables = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=st.floats(-10, 10, width=32))


@given(tables)
def test_4_bit_blocks_are_no_worse_than_plain_rounding_and_keep_zero(weight):
    codes, scales, zeros = quantize_blocks(weight)
    assert codes.max(initial=0) <= MAX_CODE
    assert zeros.max(initial=0) <= MAX_CODE
    back = (codes.reshape(*scales.shape, BLOCK).astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    filled = np.zeros_like(codes, np.float32)
    filled[:, : weight.shape[1]] = weight
    blocks = filled.reshape(back.shape)
    assert (back[blocks == 0] == 0).all()
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    step = ((high - low) / MAX_CODE)[:, :, None].astype(np.float64)
    # Rounding to the nearest of 16 values is at most half a step off; zero itself was rounded to a step.
    assert ((back - blocks) ** 2).sum() <= ((step * 1.001 + 1e-30) ** 2 * np.ones_like(blocks)).sum()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, MAX_CODE)))
def test_two_codes_are_a_byte(codes):
    packed = pack(codes)
    back = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(codes), -1)
    assert (back[:, : codes.shape[1]] == codes).all()
    assert (back[:, codes.shape[1] :] == 0).all()


def rounded(array):
    """A weight [inner, outer] or the rows of a table as 4 bits give them back."""
    codes, scales, zeros = quantize_blocks(array)
    back = (codes.reshape(*scales.shape, BLOCK).astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    return back.reshape(len(array), -1)[:, : array.shape[1]]


@pytest.mark.parametrize("left", [False, True])
def test_4_bit_answers_are_those_of_the_rounded_weights(built_tiny, left):
    """On random weights 4 bits are another model: held against the fp32 graph of the same rounded weights."""
    std = passes.read(built_tiny.path("onnx-std") / "model.onnx")
    for node in std.graph:
        if node.op_type in ("MatMul", "Gemm", "Gather") and not node.outputs[0].is_graph_output():
            value = node.inputs[0 if node.op_type == "Gather" else 1]
            if value.const_value is not None and value.const_value.shape.rank() == 2:
                array = value.const_value.numpy()
                by_rows = node.op_type == "Gather" or node.attributes.get_int("transB", 0)
                value.const_value = ir.tensor(rounded(array) if by_rows else rounded(array.T).T.copy(), name=value.name)
    batch = pad(ROWS, NAMES, 0, left)
    want = answer(std, batch)
    fp32 = passes.read(built_tiny.path("onnx-fp32") / "model.onnx")
    model, counts = passes.rewrite(fp32, ["quantize-linear-int4", "quantize-embedding-int4"], ATTENTION)
    assert counts == {"quantize-linear-int4": 10, "quantize-embedding-int4": 2}
    found = operators(model)
    assert (found["MatMulNBits"], found["GatherBlockQuantized"]) == (10, 2)
    assert np.abs(answer(model, batch) - want).max() < 0.1 * np.abs(want).max()
    assert "int8_headroom" not in passes.facts(model)
    assert passes.facts(model)["bytes_by_part"]["embeddings"] < 0.2 * (30522 + 512) * 32 * 4


def test_a_table_is_looked_up_as_it_was_rounded():
    table = np.random.default_rng(0).normal(size=(6, 2 * BLOCK)).astype(np.float32)
    model = small_graph(
        [helper.make_node("Gather", ["t", "i"], ["y"])], {"t": table, "i": np.array([[4, 0, 5]])}, ("b", "s", "w")
    )
    model, counts = passes.rewrite(model, ["quantize-embedding-int4"], ATTENTION)
    assert counts == {"quantize-embedding-int4": 1}
    codes, scales, zeros = quantize_blocks(table)
    back = (codes.reshape(6, 2, BLOCK).astype(np.float32) - zeros[:, :, None]) * scales.astype(np.float16)[:, :, None]
    got = answer(model, {"x": np.zeros((1, 1, 4), np.float32)})
    assert np.abs(got[0] - back.reshape(6, -1)[[4, 0, 5]]).max() < 1e-2


@pytest.mark.parametrize("content", [b"", b"not a graph at all", b"\x08\x08"])
def test_a_file_that_is_no_onnx_model_is_an_error_in_words(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(GraphError, match="is not a valid ONNX model"):
        passes.read(tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="is not a valid ONNX model"):
        passes.read(tmp_path / "missing.onnx")


def test_a_graph_with_a_dangling_input_is_no_model(std, tmp_path):
    proto = ir.to_proto(std)
    proto.graph.node[5].input[0] = "nobody makes this"
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="is not a valid ONNX model"):
        passes.read(tmp_path / "model.onnx")


def test_facts_count_every_byte_of_weights_by_part(built_tiny):
    model = passes.read(built_tiny.path("onnx-std") / "model.onnx")
    facts = passes.facts(model)
    assert sum(facts["bytes_by_part"].values()) == sum(facts["bytes_by_dtype"].values())
    assert facts["bytes_by_part"]["embeddings"] == (30522 + 512) * 32 * 4
    assert facts["opset"] == {"": 18}


@pytest.mark.parametrize(
    "name", ["quantize-linear", "quantize-linear-std", "quantize-linear-static", "quantize-linear-std-static"]
)
def test_unsigned_weights_change_no_answer(std, name):
    """Saturating processors are exact with them, others as before."""
    model, _ = passes.rewrite(std, ["fuse"] if "std" not in name else [], ATTENTION)
    read = {str(node.inputs[0].name): Activation(0.05, 128) for node in linear_nodes(model)}
    context = dataclasses.replace(ATTENTION, activations=read)
    model, _ = passes.rewrite(model, [name], context)
    batch = pad(ROWS, NAMES, 0)
    before, room = answer(model, batch), headroom(model)
    assert room < 1
    products = [reader for node in model.graph if (reader := weight_of(node))]
    assert unsigned_weights(model) == len(products)
    stored = [reader.inputs[index].const_value.numpy() for reader, index in products]
    assert {array.dtype for array in stored} == {np.dtype(np.uint8)}
    assert unsigned_weights(model) == 0  # they are already
    assert np.abs(answer(model, batch) - before).max() < 1e-5


def test_two_attentions_share_one_bias(std):
    """A layer each, with one query or all: what they make of the mask is made once for each kind."""
    model, _ = passes.rewrite(std, ["fuse", "first-token", "first-query"], ATTENTION)
    model, _ = passes.rewrite(model, ["quantize-linear-int4"], ATTENTION)  # a step of its own, in front of the last one
    onnx.checker.check_model(ir.to_proto(model))  # sorted, among others
    biases = [node.inputs[5] for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert len(biases) == len(set(biases)) == 2  # all queries, one query
    assert operators(model)["Expand"] == 2
    assert len({node.inputs[0] for node in model.graph if node.op_type == "Expand"}) == 1
