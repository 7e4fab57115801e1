"""A small valid bundle, and attacks on it: mutated values, and graphs that need much time or memory."""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from hostile.harness import call
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from toolchain.results.session_settings import AppSettings
from toolchain.ship import worker
from toolchain.ship.bundle_files.verify import SCHEMA, canonical_id, pad_rows
from toolchain.ship.process import BundleProcess
from toolchain.system.child import Child

MODEL = "model.onnx"
VARIANT = "onnx-fp32"
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "bad", "film", "good", "old", "very")
SENTENCES = ("a good film", "bad", "a very very old film")


def write_bundle(folder: Path) -> None:
    """Writes a valid bundle, whose model adds up two numbers for each token, into an empty folder."""
    _write_tokenizer(folder / "tokenizer.json")
    onnx.save(_adding_model(), folder / MODEL)
    _write_json(folder / "config.json", {"id2label": {"0": "no", "1": "yes"}, "pad_token_id": 0})
    for name in ("tokenizer_config.json", "README.md", "verify.py"):
        (folder / name).write_text("{}")
    _write_json(folder / "golden.json", _golden_content(folder))
    inputs = [{"name": name, "dtype": "int64", "shape": ["batch", "tokens"]} for name in _INPUTS]
    model = {
        "variant": VARIANT,
        "file": MODEL,
        "bytes": (folder / MODEL).stat().st_size,
        "artifact_id": "0" * 64,
        "ir_version": 8,
        "opset": {"": 13},
        "operators": ["Gather"],
        "inputs": inputs,
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
        "step": {"name": "optimize", "settings": {}},
        "int8_headroom": None,
        "onnxruntime": "1.15",
        "exact_on": "any processor",
        "session_options": {},
        "app_settings": asdict(AppSettings(2, batch_size=8)),
        "tolerance": {"largest": 1e-3, "median": 1e-4},
        "measured": "not measured",
        "validation": {"unit": "sentences", "count": 200, "flips": 0},
    }
    body = {
        "schema": SCHEMA,
        "target": "python",
        "model": {"name": "sums", "source": {}, "license": "MIT", "origin": "a test", "data": "none"},
        "labels": ["no", "yes"],
        "task": "single_label_classification",
        "multi_label": False,
        "max_length": 8,
        "pad_id": 0,
        "tokenizer_in_graph": None,
        "onnxruntime": "1.15",
        "models": [model],
        "files": [{"path": path.name, "bytes": 0, "sha256": ""} for path in sorted(folder.iterdir())],
    }
    _write_json(folder / "bundle.json", body)
    reseal(folder)


_INPUTS = ("input_ids", "attention_mask")


def _write_tokenizer(file: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(file))


def _adding_model() -> onnx.ModelProto:
    table = np.random.default_rng(1).normal(size=(len(WORDS), 2)).astype(np.float32)
    constants = {"table": table, "last": np.array([2]), "first": np.array([1])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["values"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["values", "column"], ["used"]),
        helper.make_node("ReduceSum", ["used", "first"], ["logits"], keepdims=0),
    ]
    return make_model(nodes, constants)


def make_model(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Returns a model with the inputs and the output of a classifier."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in _INPUTS],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def endless_model() -> onnx.ModelProto:
    """Returns a model that repeats one operation 2^62 times."""
    return _looping_model([], {"rounds": np.array(2**62)})


def trap_model() -> onnx.ModelProto:
    """Returns the model of `write_bundle` with a trap: a text with an unknown word repeats one operation 2^62 times."""
    nodes = [
        helper.make_node("Equal", ["input_ids", "unknown"], ["is_unknown"]),
        helper.make_node("Cast", ["is_unknown"], ["one"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["one"], ["trap"], keepdims=0),
        helper.make_node("Mul", ["trap", "many"], ["rounds"]),
    ]
    return _looping_model(nodes, {"unknown": np.array(WORDS.index("[UNK]")), "many": np.array(2**62)})


def _looping_model(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Returns the model of `write_bundle`, which then negates its logits ``rounds`` times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["still"]), helper.make_node("Neg", ["value"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    model = _adding_model()
    model.graph.node[-1].output[0] = "sums"
    model.graph.node.extend([*nodes, helper.make_node("Loop", ["rounds", "true", "sums"], ["logits"], body=body)])
    constants = {**constants, "true": np.array(True)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def large_model() -> onnx.ModelProto:
    """Returns a model whose one intermediate array has 700 million floats, which are 2.8 GB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=1),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["ids", "zero"], ["logits"]),
    ]
    return make_model(nodes, {"size": np.array([700_000_000])})


def external_tensor(name: str) -> onnx.TensorProto:
    """Returns a tensor of two floats that is stored in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def leaking_models() -> dict[str, onnx.ModelProto]:
    """Returns models that store the tensor ``secret`` in another file, by the place of the tensor in the model.

    ONNX Runtime opens the other file in all of these places except ``training``.
    """
    constant = helper.make_node("Constant", [], ["secret"], value=external_tensor("secret"))
    sparse = onnx.SparseTensorProto(values=external_tensor("secret"), dims=[2])
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 1])))
    function = helper.make_function(
        "local",
        "Leak",
        ["sums"],
        ["logits"],
        [constant, helper.make_node("Add", ["sums", "secret"], ["logits"])],
        [helper.make_opsetid("", 13)],
    )
    places = ("initializer", "node", "function", "sparse", "sparse node", "training", "deep graph")
    models_by_place = {place: _adding_model() for place in places}
    for place, model in models_by_place.items():
        model.graph.node[-1].output[0] = "sums"
        model.graph.node.append(helper.make_node("Add", ["sums", "secret"], ["logits"]))
        graph = model.graph
        if place == "initializer":
            graph.initializer.append(external_tensor("secret"))
        elif place == "node":
            graph.node.insert(0, constant)
        elif place == "function":
            model.functions.append(function)
            model.opset_import.append(helper.make_opsetid("local", 1))
            graph.node[-1].CopyFrom(helper.make_node("Leak", ["sums"], ["logits"], domain="local"))
        elif place == "sparse":
            graph.sparse_initializer.append(sparse)
        elif place == "sparse node":
            graph.node.insert(0, helper.make_node("Constant", [], ["secret"], sparse_value=sparse))
        elif place == "training":
            graph.node[-1].input[1] = "sums"
            model.training_info.add().initialization.initializer.append(external_tensor("secret"))
        else:
            for _ in range(400):  # more graphs in graphs than Python's stack has frames for a function of few lines
                branch = graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
                graph = branch.g
            graph.initializer.append(external_tensor("secret"))
    return models_by_place


def _golden_content(folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    rows = [tokenizer.encode(text).ids for text in SENTENCES]

    def logits(batch: Sequence[Sequence[int]], side: str) -> list[list[float]]:
        arrays = pad_rows(batch, side, 0)
        feeds = {name: np.array(arrays[name], np.int64) for name in _INPUTS}
        return [[round(float(x), 6) for x in row] for row in session.run(["logits"], feeds)[0]]

    sides = ("right", "left")
    return {
        "sentences": [{"text": text, "input_ids": ids} for text, ids in zip(SENTENCES, rows, strict=True)],
        "logits": {VARIANT: [logits([ids], "right")[0] for ids in rows]},
        "batches": [{"padding": side, "sentences": list(range(len(rows)))} for side in sides],
        "batch_logits": {VARIANT: [logits(rows, side) for side in sides]},
    }


def _write_json(file: Path, body: Any) -> None:
    file.write_text(json.dumps(body))


def replace_model(folder: Path, model: onnx.ModelProto) -> None:
    """Writes a model into a bundle, and seals the bundle again."""
    onnx.save(model, folder / MODEL)
    reseal(folder)


def replace_values(folder: Path, name: str, **values: Any) -> None:
    """Changes values of a JSON file of a bundle, and seals the bundle again."""
    _write_json(folder / name, {**json.loads((folder / name).read_bytes()), **values})
    reseal(folder)


def reseal(folder: Path) -> None:
    """Writes the digests and the id of a changed bundle, as an attacker would, where bundle.json still allows that."""
    file = folder / "bundle.json"
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
        body = json.loads(file.read_bytes())
        for entry in body["files"]:
            content = (folder / entry["path"]).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        body["id"] = canonical_id(body)
        _write_json(file, body)


@contextlib.contextmanager
def without_child() -> Iterator[None]:
    """Runs the child's part of `verify` and `predict` in this process, without limits.

    A child takes half a second. Use this function only for graphs that are harmless.
    """
    workers: dict[int, worker.Worker] = {}

    def ask(self: BundleProcess, message: Mapping[str, Any], timeout_s: float | None) -> dict[str, Any]:
        message = json.loads(json.dumps(message))
        if "do" not in message:
            workers[id(self)] = worker.Worker(Path(message["folder"]), message["memory_bytes"])
            return {}
        result: dict[str, Any] = json.loads(json.dumps(getattr(workers[id(self)], message.pop("do"))(**message)))
        return result

    with (
        mock.patch.object(Child, "__init__", return_value=None),
        mock.patch.object(Child, "close"),
        mock.patch.object(BundleProcess, "ask", ask),
        mock.patch.object(worker, "_set_alarm"),
    ):
        yield


def prepare_attack(folder: Path) -> None:
    """Writes a valid bundle and a file of texts, for attacks on the bundle."""
    (folder / "bundle").mkdir()
    write_bundle(folder / "bundle")
    (folder / "texts.txt").write_text("a good film\nunknown\n")


def list_attacked(folder: Path) -> list[Path]:
    """Returns the JSON files of the bundle."""
    return [folder / "bundle" / name for name in ("bundle.json", "golden.json", "tokenizer.json", "config.json")]


def use_bundle(folder: Path, rng: random.Random) -> None:
    """Verifies the bundle, and predicts with it even if `verify` refuses it."""
    with without_child():
        try:
            call("verify", folder / "bundle")
        finally:
            call("predict", folder / "bundle", folder / "texts.txt")
