"""Test models that `release_probe.py` runs with a release of ONNX Runtime, and the right outputs, computed by numpy.

A `Question` is a test model with its inputs and expected outputs. `write` saves all test models, and questions.json,
which lists all test models. The test models form the sets `versions`, `attention` and `precision`. The test models in
the set `versions` show the highest IR version, opset and ORT format that an ONNX Runtime release reads. The set
`attention` tests padded batches; the set `precision` tests 8-bit products.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.ship.targets import ort_format
from toolchain.ship.targets.releases import MICROSOFT, STANDARD

VERSIONS, ATTENTION, PRECISION = "versions", "attention", "precision"
IR_VERSIONS, OPSETS, ORT_FORMATS = range(7, 21), range(13, 41), range(4, 10)
# Every release that is tested reads IR version 8 and opset 15, so these are the default versions of a test model.
IR_VERSION, OPSET = 8, 15
SEED = 29

BATCH, TOKENS, HEADS, SIZE = 3, 8, 2, 8
WIDTH = HEADS * SIZE
LENGTHS = (8, 5, 3)  # number of tokens of each sentence in a padded batch
LOWEST = float(np.finfo(np.float32).min)
EXACT_OPTION = ("session.x64quantprecision", "1")
SMALL = 4  # int8 weights divided by 4 have 6 bits, so that no sum of products saturates


@dataclass(frozen=True)
class Question:
    """A model, its inputs, and the expected outputs, which numpy computes."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def write(folder: Path) -> None:
    """Saves all test models with their inputs and expected outputs, and questions.json, which lists the test models."""
    sets: dict[str, list[dict[str, Any]]] = {
        VERSIONS: list(_versions(folder)),
        ATTENTION: [_save(folder, question) for question in attention()],
        PRECISION: [],
    }
    for question in precision():
        entry = _save(folder, question)
        for form, file in _forms(folder, entry["file"]).items():
            for option in (None, EXACT_OPTION):
                name = (
                    f"{question.name}, {form}, {'with' if option else 'without'} the option session.x64quantprecision"
                )
                sets[PRECISION].append({**entry, "name": name, "file": file, "option": option})
    (folder / "questions.json").write_text(json.dumps(sets, indent=1))


def _forms(folder: Path, file: str) -> dict[str, str]:
    """Saves a model as .ort files with signed and with unsigned weights; returns file format → file name."""
    signed, unsigned = f"{file}.signed.ort", f"{file}.unsigned.ort"
    ort_format.save_in_process(str(folder / file), str(folder / signed))
    ort_format.save(folder / file, folder / unsigned)
    return {".onnx": file, ".ort with signed weights": signed, ".ort with unsigned weights": unsigned}


def _save(folder: Path, question: Question) -> dict[str, Any]:
    stem = question.name.replace(", ", "-").replace(" ", "-")
    onnx.save(question.model, folder / f"{stem}.onnx")
    arrays = {**question.inputs, **{f"={name}": array for name, array in question.outputs.items()}}
    np.savez(folder / f"{stem}.npz", **arrays)
    return {"name": question.name, "file": f"{stem}.onnx", "arrays": f"{stem}.npz"}


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    ir_version: int = IR_VERSION,
    opset: int = OPSET,
) -> onnx.ModelProto:
    def value_infos(values: dict[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in values.items()}
        return [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in values.items()]

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "question", value_infos(inputs), value_infos(outputs), tensors)
    sets = [helper.make_opsetid(STANDARD, opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=ir_version)


def _versions(folder: Path) -> Iterator[dict[str, Any]]:
    """Saves a test model for each IR version, opset and ORT format, and yields each model's entry of questions.json.

    Each test model is one Identity node. Many opsets define a new version of Identity; a release without a kernel for
    this version refuses the test model.
    """
    arrays = {"x": np.ones(2, np.float32)}, {"y": np.ones(2, np.float32)}
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    for number in IR_VERSIONS:
        yield _save(folder, Question(f"ir_version {number}", _model(nodes, *arrays, {}, ir_version=number), *arrays))
    for number in OPSETS:
        yield _save(folder, Question(f"opset {number}", _model(nodes, *arrays, {}, opset=number), *arrays))
    entry = _save(folder, Question("ort_format", _model(nodes, *arrays, {}), *arrays))
    ort_format.save(folder / entry["file"], folder / "written.ort")
    for number in ORT_FORMATS:
        (folder / f"ort_format-{number}.ort").write_bytes(_set_version(folder / "written.ort", number))
        yield {**entry, "name": f"ort_format {number}", "file": f"ort_format-{number}.ort"}


def _set_version(path: Path, number: int) -> bytes:
    """Returns the content of a file in ORT format, with the version number replaced by `number`, 0 to 9."""
    content = path.read_bytes()
    table = ort_format.read_root(content)._tab
    # Slot 4 of the FlatBuffers table holds the version as a string, whose first 4 bytes hold its length.
    offset = table.Indirect(table.Pos + table.Offset(4)) + 4
    return content[:offset] + str(number).encode("ascii") + content[offset + 1 :]


def attention() -> Iterator[Question]:
    """Yields test models of three attention operators, with batches padded on the right or on the left.

    The operators are MultiHeadAttention, Attention and QAttention. The test models of MultiHeadAttention differ in the
    number of query tokens, and in the input that hides the padding.
    """
    for side in ("right", "left"):
        mask = _mask(side)
        for queries in (TOKENS, 1, 2):
            yield from _multi_head(mask, queries, side)
        for question in (_attention(mask), _qattention(mask, SMALL)):
            yield replace(question, name=f"{question.name}: mask_index, {side}")


def _multi_head(mask: np.ndarray, queries: int, side: str) -> Iterator[Question]:
    """Yields test models of MultiHeadAttention with `queries` query tokens and `TOKENS` key tokens.

    A padding mask or an attention bias hides the padding.
    """
    random = np.random.default_rng(SEED)
    query, key, value = (random.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32) for _ in range(3))
    feeds = {"query": query[:, :queries], "key": key, "value": value}
    bias = np.tile(_bias(mask), (1, HEADS, queries, 1))
    # The operator adds an attention bias to the attention scores, so that the bias hides padding tokens. `shared_bias`
    # hides the padding of the second sentence, and the operator adds `shared_bias` to the scores of all sentences.
    shared_bias = bias[1:2]
    padding = "key_padding_mask" if queries == TOKENS else "key_padding_mask longer than the query"
    for trait, position, mask_input, bias_used in (
        (padding, 4, mask, bias),
        ("attention_bias", 5, bias, bias),
        ("attention_bias of one head", 5, bias[:, :1], bias),
        ("attention_bias of one sentence", 5, shared_bias, np.tile(shared_bias, (BATCH, 1, 1, 1))),
    ):
        names = ["query", "key", "value", "", "", ""]
        names[position] = "mask"
        while not names[-1]:
            names.pop()
        node = helper.make_node("MultiHeadAttention", names, ["y"], domain=MICROSOFT, num_heads=HEADS)
        inputs, outputs = {**feeds, "mask": mask_input}, {"y": _attend(feeds["query"], key, value, bias_used)}
        name = f"MultiHeadAttention: {trait}, {queries} of {TOKENS} tokens, {side}"
        yield Question(name, _model([node], inputs, outputs, {}), inputs, outputs)


def _attention(mask: np.ndarray) -> Question:
    random = np.random.default_rng(SEED)
    x = random.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    weight = random.standard_normal((WIDTH, 3 * WIDTH)).astype(np.float32) / 4
    inputs = {"x": x, "mask": mask}
    outputs = {"y": _attend(*np.split(x @ weight, 3, axis=-1), _bias(mask))}
    weights = {"weight": weight, "bias": np.zeros(3 * WIDTH, np.float32)}
    node = helper.make_node("Attention", ["x", "weight", "bias", "mask"], ["y"], domain=MICROSOFT, num_heads=HEADS)
    return Question("Attention", _model([node], inputs, outputs, weights), inputs, outputs)


def _qattention(mask: np.ndarray, smaller: int = 1) -> Question:
    """Returns a test model of QAttention, whose weights are divided by `smaller`."""
    x, weight = _uint8(BATCH, TOKENS, WIDTH), _int8(WIDTH, 3 * WIDTH) // np.int8(smaller)
    # Both scales are powers of two, so multiplying by a scale does not round.
    scale = np.float32(2**-6), np.float32(2**-10)
    inputs = {"x": x, "mask": mask}
    projected = (x.astype(np.int32) @ weight.astype(np.int32)).astype(np.float32) * scale[0] * scale[1]
    outputs = {"y": _attend(*np.split(projected, 3, axis=-1), _bias(mask))}
    weights = {
        "weight": weight,
        "bias": np.zeros(3 * WIDTH, np.float32),
        "x_scale": scale[0],
        "weight_scale": scale[1],
        "x_zero": np.uint8(0),
        "weight_zero": np.int8(0),
    }
    names = ["x", "weight", "bias", "x_scale", "weight_scale", "mask", "x_zero", "weight_zero"]
    node = helper.make_node("QAttention", names, ["y"], domain=MICROSOFT, num_heads=HEADS)
    return Question("QAttention", _model([node], inputs, outputs, weights), inputs, outputs)


def _mask(side: str) -> np.ndarray:
    """Returns a mask of dtype int32 and shape [batch, tokens]: 1 for a token, 0 for padding."""
    mask = np.array([[1] * length + [0] * (TOKENS - length) for length in LENGTHS], np.int32)
    return mask if side == "right" else np.ascontiguousarray(mask[:, ::-1])


def _bias(mask: np.ndarray) -> np.ndarray:
    """Returns a float32 attention bias of shape [batch, 1, 1, tokens]: 0 for a token, the lowest float for padding."""
    return np.where(mask[:, None, None] > 0, np.float32(0), np.float32(LOWEST))


def _attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Returns scaled dot-product attention with `HEADS` heads.

    The arrays `query`, `key` and `value` have the shape [batch, tokens, width].
    """

    def heads(array: np.ndarray) -> np.ndarray:
        return array.reshape(BATCH, -1, HEADS, SIZE).transpose(0, 2, 1, 3).astype(np.float64)

    scores = heads(query) @ heads(key).swapaxes(2, 3) / np.sqrt(SIZE) + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result = weights / weights.sum(axis=-1, keepdims=True) @ heads(value)
    return result.transpose(0, 2, 1, 3).reshape(query.shape).astype(np.float32)


def precision() -> Iterator[Question]:
    """Yields test models that multiply unsigned 8-bit activations by signed 8-bit weights.

    In each test model, sums of two neighbouring products need more than 16 bits.
    """
    a, b = _uint8(BATCH, TOKENS, WIDTH), _int8(WIDTH, WIDTH)
    product = a.astype(np.int32) @ b.astype(np.int32)
    float_product = product.astype(np.float32)
    floats = a.astype(np.float32)
    floats[..., :2] = 0, 255  # for a range from 0 to 255, ONNX Runtime computes a scale of 1 and a zero point of 0
    scaled_product = (floats.astype(np.int32) @ b.astype(np.int32)).astype(np.float32)
    constant = np.float32(1)
    zeros = {"a_zero": np.uint8(0), "b_zero": np.int8(0)}
    scales = {"a_scale": constant, "b_scale": constant}
    yield _product("MatMulInteger", STANDARD, ["a", "b", "a_zero", "b_zero"], a, product, {"b": b, **zeros})
    names = ["a", "b", "b_scale", "b_zero"]
    yield _product("DynamicQuantizeMatMul", MICROSOFT, names, floats, scaled_product, {"b": b, **scales, **zeros})
    names = ["a", "b", "a_scale", "b_scale", "a_zero", "b_zero"]
    yield _product("MatMulIntegerToFloat", MICROSOFT, names, a, float_product, {"b": b, **scales, **zeros})
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "a_scale", "a_zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "a_scale", "a_zero"], ["a_again"]),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["b_again"]),
        helper.make_node("MatMul", ["a_again", "b_again"], ["y"]),
    ]
    inputs, outputs = {"a": a.astype(np.float32)}, {"y": float_product}
    yield Question("MatMul in QDQ", _model(nodes, inputs, outputs, {"b": b, **scales, **zeros}), inputs, outputs)
    yield _qattention(np.ones((BATCH, TOKENS), np.int32))


def _product(
    operator: str, domain: str, names: list[str], a: np.ndarray, y: np.ndarray, weights: dict[str, np.ndarray]
) -> Question:
    constants = {name: array for name, array in weights.items() if name in names}
    node = helper.make_node(operator, names, ["y"], domain=domain)
    return Question(operator, _model([node], {"a": a}, {"y": y}, constants), {"a": a}, {"y": y})


def _uint8(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(128, 256, shape, dtype=np.uint8)


def _int8(*shape: int) -> np.ndarray:
    """Returns int8 weights of large magnitude; both weights of a pair along the inner axis have the same sign."""
    random = np.random.default_rng(SEED)
    signs = np.repeat(random.choice([-1, 1], (shape[0] // 2, *shape[1:])), 2, axis=0)
    return (random.integers(100, 128, shape) * signs).astype(np.int8)
