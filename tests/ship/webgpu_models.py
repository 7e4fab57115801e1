"""ONNX models of one operator each, which ask the WebGPU provider whether it computes the operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH, HEADS = 40, 64, 2
MICROSOFT = "com.microsoft"
_random = np.random.default_rng(7)


def _floats(*shape: int) -> np.ndarray:
    return _random.normal(size=shape).astype(np.float32)


def _integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


INPUT = _floats(1, TOKENS, WIDTH)
UNARY = (
    *("Abs", "Ceil", "Cos", "Erf", "Exp", "Flatten", "Floor", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sign", "Sin"),
    *("Softmax", "Sqrt", "Tanh", "Trilu"),
)
BINARY = ("Add", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Sub", "Sum")
BLOCK_SIZE = 32
NBITS = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": BLOCK_SIZE}
BLOCKS = {"bits": 4, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
_blocks = WIDTH // BLOCK_SIZE
_packed = _random.integers(0, 255, (WIDTH, WIDTH // 2), dtype=np.uint8)
_scales = np.abs(_floats(WIDTH, _blocks)) / 10
_zeros = np.full((WIDTH, _blocks // 2), 0x88, np.uint8)
_mask = np.ones((1, TOKENS), np.int32)
# Operator → inputs and attributes. In the inputs, "x" stands for the model's input, and "" for an omitted input.
QUESTIONS: dict[str, tuple[list[np.ndarray | str], dict[str, object]]] = {
    **{name: (["x"], {}) for name in UNARY},
    **{name: (["x", np.abs(_floats(WIDTH)) + 1], {}) for name in BINARY},
    "Cast": (["x"], {"to": TensorProto.FLOAT}),
    "Clip": (["x", np.array(-1, np.float32), np.array(1, np.float32)], {}),
    "Concat": (["x", _floats(1, 1, WIDTH)], {"axis": 1}),
    "DynamicQuantizeLinear": (["x"], {}),
    "CumSum": (["x", np.array(1)], {}),
    "Expand": (["x", _integers(2, TOKENS, WIDTH)], {}),
    "Gather": (["x", _integers(0)], {"axis": 1}),
    "GatherElements": (["x", np.arange(TOKENS).reshape(1, TOKENS, 1)], {"axis": 1}),
    "Gemm": ([_floats(TOKENS, WIDTH), _floats(WIDTH, 3), _floats(3)], {}),
    "LayerNormalization": (["x", _floats(WIDTH), _floats(WIDTH)], {}),
    "MatMul": (["x", _floats(WIDTH, 3)], {}),
    "Pow": (["x", np.array(2, np.float32)], {}),
    "Range": ([np.array(each, np.float32) for each in (0, 5, 1)], {}),
    "ReduceMean": (["x", _integers(-1)], {}),
    "ReduceSum": (["x", _integers(-1)], {}),
    "Reshape": (["x", _integers(0, 0, HEADS, -1)], {}),
    "Shape": (["x"], {}),
    "Slice": (["x", _integers(1), _integers(3), _integers(1)], {}),
    "Split": (["x", _integers(24, 40)], {"axis": -1}),
    "Squeeze": (["x", _integers(0)], {}),
    "Tile": (["x", _integers(1, 2, 1)], {}),
    "Transpose": (["x"], {"perm": [0, 2, 1]}),
    "Unsqueeze": (["x", _integers(0)], {}),
    "Where": ([INPUT > 0, "x", _floats(WIDTH)], {}),
    f"{MICROSOFT}.Attention": (
        ["x", _floats(WIDTH, 3 * WIDTH) / 8, _floats(3 * WIDTH), _mask],
        {"num_heads": HEADS},
    ),
    f"{MICROSOFT}.BiasGelu": (["x", _floats(WIDTH)], {}),
    f"{MICROSOFT}.FastGelu": (["x"], {}),
    f"{MICROSOFT}.GatherBlockQuantized": ([_packed, _integers(3, 1), _scales, _zeros], BLOCKS),
    f"{MICROSOFT}.Gelu": (["x"], {}),
    f"{MICROSOFT}.MatMulNBits": (
        ["x", _packed.reshape(WIDTH, _blocks, BLOCK_SIZE // 2), _scales.reshape(-1), _zeros.reshape(-1)],
        NBITS,
    ),
    f"{MICROSOFT}.MultiHeadAttention": (
        ["x", "x", "x", "", "", np.zeros((1, HEADS, TOKENS, TOKENS), np.float32)],
        {"num_heads": HEADS},
    ),
    f"{MICROSOFT}.QuickGelu": (["x"], {}),
    f"{MICROSOFT}.SkipLayerNormalization": (["x", _floats(1, TOKENS, WIDTH), _floats(WIDTH), _floats(WIDTH)], {}),
}
OUTPUTS = {"Split": ["y", "y2"], "DynamicQuantizeLinear": ["y", "y2", "y3"]}
TYPES = {
    "Shape": TensorProto.INT64,
    "DynamicQuantizeLinear": TensorProto.UINT8,
    **dict.fromkeys(("Equal", "Greater", "Less"), TensorProto.BOOL),
}


def one_operator_models() -> Iterator[tuple[str, bytes]]:
    """Yields the table's name of each operator, and a model with this operator; the input is "x", the output "y"."""
    for key, (values, attributes) in QUESTIONS.items():
        domain, _, operator = key.rpartition(".")
        names = [value if isinstance(value, str) else f"c{index}" for index, value in enumerate(values)]
        stored = [
            numpy_helper.from_array(value, name)
            for name, value in zip(names, values, strict=True)
            if isinstance(value, np.ndarray)
        ]
        node = helper.make_node(operator, names, OUTPUTS.get(operator, ["y"]), domain=domain, **attributes)
        graph = helper.make_graph(
            [node],
            "one operator",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, INPUT.shape)],
            [helper.make_tensor_value_info("y", TYPES.get(operator, TensorProto.FLOAT), None)],
            stored,
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
        yield key, helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
