"""Floors: a model's work from the header of its weights, the machine's rates, and the minimum time of a sentence."""

import json
import math
import shutil
import stat
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from toolchain import passes
from toolchain.artifacts import store
from toolchain.backends.pytorch import load_model, save_weights
from toolchain.bench import machine_probe, roofline
from toolchain.bench.roofline import Work, floor_ms, read_work, weight_bytes
from toolchain.errors import BenchError, CheckpointError
from toolchain.models import architectures, checkpoints
from toolchain.models.architectures import LayerShape
from toolchain.pruning.costs import TOKENS, EncoderSizes
from toolchain.system import hardware

LENGTHS = (1, 7, 25)


def counted(model, tokens):
    """Multiply-accumulates by kind of product, of the operators PyTorch really calls."""
    model.eval().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((1, tokens), dtype=torch.long))
    found = Counter()
    for operator, count in counter.get_flop_counts()["Global"].items():
        found["activations" if "bmm" in str(operator) else "weights"] += count // 2
    return found


@pytest.mark.parametrize("model", ["built_tiny", pytest.param("reference", marks=pytest.mark.slow)])
def test_work_is_what_pytorch_computes(model, request):
    folder = request.getfixturevalue(model).path("torch-fp32")
    found, loaded = read_work(folder), load_model(folder)
    assert [found.macs(n) for n in LENGTHS] == [counted(loaded, n).total() for n in LENGTHS]
    assert found.macs(TOKENS) - found.head_parameters == EncoderSizes.from_model(loaded).multiply_accumulates


@pytest.mark.parametrize("shapes", [[(3, 40), (1, 8)], [(0, 8), (2, 0)], [(1, 0), (0, 24)], [(2, 8), (0, 0)]])
def test_work_of_a_pruned_model(built_tiny, tmp_path, shapes):
    source = built_tiny.path("torch-fp32")
    loaded = load_model(source)
    architectures.reshape(loaded, [LayerShape(*shape) for shape in shapes])
    save_weights(loaded.state_dict(), tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    found = read_work(tmp_path)
    assert found.macs(TOKENS) == counted(loaded, TOKENS).total()
    assert found.macs(TOKENS) - found.head_parameters == EncoderSizes.from_model(loaded).multiply_accumulates


def in_graph(path, tokens):
    """Multiply-accumulates of the graph's products with weights, by the rows that really go through each."""
    model = onnx.load(path)
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Attention") and n.input[1] in weights]
    for node in products:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ones = np.ones((1, tokens), np.int64)
    names = [node.input[0] for node in products]
    taken = session.run(names, {tensor.name: ones for tensor in session.get_inputs()})
    return sum(
        value.size // value.shape[-1] * math.prod(weights[node.input[1]])
        for value, node in zip(taken, products, strict=True)
    )


@pytest.mark.parametrize("model", ["built_tiny", pytest.param("reference", marks=pytest.mark.slow)])
def test_reading_the_first_token_alone_computes_less(model, request):
    workspace = request.getfixturevalue(model)
    found = read_work(workspace.path("torch-fp32"))
    for tokens in LENGTHS:
        attention = 2 * tokens**2 * sum(found.attention_widths)
        assert in_graph(workspace.path("onnx-std") / "model.onnx", tokens) == found.macs(tokens) - attention
        # Of the last attention's own products one query is left.
        attention -= 2 * tokens * (tokens - 1) * found.attention_widths[-1]
        assert (
            in_graph(workspace.path("onnx-fp32") / "model.onnx", tokens) == found.macs(tokens, True, True) - attention
        )


def test_work_after_the_last_attention_may_span_layers(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    loaded = load_model(source)
    architectures.reshape(loaded, [LayerShape(2, 8), LayerShape(0, 24)])
    save_weights(loaded.state_dict(), tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    width, head = 32, 8
    assert read_work(tmp_path).tail_parameters == width * (2 * head + 2 * 8 + 2 * 24)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "mobilebert"])
def test_any_encoder(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = {**SMALL, "vocab_size": 2000, "embedding_size": 8}
    if kind == "mobilebert":
        settings |= {"true_hidden_size": 16, "intra_bottleneck_size": 16}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(tmp_path)
    found = read_work(tmp_path)
    for tokens in LENGTHS:
        real = counted(model, tokens)
        attention = real["activations"] if kind in architectures.LAYOUTS else 0
        assert found.macs(tokens) == real["weights"] + attention
    assert (sum(found.attention_widths) > 0) == (kind in architectures.LAYOUTS)


def test_an_unknown_layout_has_its_linear_layers(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    tensors = load_file(source / checkpoints.WEIGHTS)
    renamed = {name.replace("distilbert.transformer", "mystery.stack"): t for name, t in tensors.items()}
    renamed = {name.replace("distilbert.", "mystery."): t for name, t in renamed.items()}
    save_file(renamed, tmp_path / checkpoints.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    known = read_work(source)
    assert read_work(tmp_path) == Work(known.linear_parameters, (), known.head_parameters)
    assert read_work(tmp_path).macs(9, first_token=True, first_query=True) == read_work(tmp_path).macs(9)


def test_no_work_without_weights_or_where_layers_share_them(built_tiny, tmp_path):
    assert read_work(tmp_path) is None
    assert read_work(built_tiny.path("onnx-int8")) is None
    shutil.copyfile(built_tiny.path("torch-fp32") / checkpoints.WEIGHTS, tmp_path / checkpoints.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    assert read_work(tmp_path) is None


def test_weights_that_cannot_be_read(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    (tmp_path / checkpoints.WEIGHTS).write_bytes((source / checkpoints.WEIGHTS).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_work(tmp_path)


def test_bytes_of_weights_leave_the_tables_out(built_tiny):
    found = read_work(built_tiny.path("torch-fp32"))
    parameters = found.linear_parameters + found.head_parameters
    for variant, each in (("torch-fp32", 4), ("onnx-fp32", 4), ("onnx-int8", 1)):
        size = weight_bytes(store.load(built_tiny.path(variant)).manifest.facts)
        assert each * parameters < size < each * parameters + 20_000  # biases, norms, scales
    assert weight_bytes({}) is None
    assert weight_bytes({"bytes_by_part": {"encoder": 1}}) is None


RATES = {"fp32_gmacs": 100.0, "fp32_gb_s": 10.0, "int8_gmacs": 400.0, "int8_gb_s": 10.0}


def test_the_floor_is_the_larger_of_two_times():
    assert floor_ms(1e9, 1e6, RATES, "fp32") == 10.0  # 10⁹ at 10¹¹ a second
    assert floor_ms(1e9, 1e6, RATES, "int8") == 2.5
    assert floor_ms(1e9, 80e6, RATES, "int8") == 8.0  # 80 MB at 10 GB a second
    assert [floor_ms(1e9, 1e6, RATES, precision) for precision in ("bf16", "fp16", "nf4")] == [None] * 3


AMOUNT = st.floats(0, 1e15)


@given(AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.sampled_from(["fp32", "int8"]))
def test_more_work_never_lowers_the_floor(macs, size, more_macs, more_bytes, precision):
    floor = floor_ms(macs, size, RATES, precision)
    assert floor_ms(macs + more_macs, size + more_bytes, RATES, precision) >= floor >= 0


@pytest.fixture
def measured(monkeypatch):
    """What was measured, with made figures in place of the measurement; on a processor with bf16."""
    asked = []

    def measure(runtime, precisions, threads, seconds, mebibytes):
        asked.append((runtime, threads))
        return {f"{p}_{unit}": 2.0 + len(asked) for p in precisions for unit in ("gmacs", "gb_s")}

    monkeypatch.setattr(roofline, "_run_probe", measure)
    monkeypatch.setattr(hardware, "processor", lambda: {"cpu": "made", "isa": ["avx512_bf16"]})
    return asked


def silent(*_):
    pass


def test_rates_are_measured_once(measured, tmp_path):
    said = []
    first = roofline.rates(tmp_path / "new", 2, lambda *progress: said.append(progress))
    assert set(first["torch"]) == {f"{p}_{u}" for p in ("fp32", "bf16", "int8") for u in ("gmacs", "gb_s")}
    assert set(first["onnx"]) == {f"{p}_{u}" for p in ("fp32", "int8") for u in ("gmacs", "gb_s")}
    assert [(done, total) for done, total, _ in said] == [(0, 2), (1, 2)]
    assert roofline.rates(tmp_path / "new", 2, silent) == first
    assert measured == [("torch", 2), ("onnx", 2)]
    roofline.rates(tmp_path / "new", 1, silent)
    assert measured[2:] == [("torch", 1), ("onnx", 1)]
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["roofline-1.json", "roofline-2.json"]


def test_a_processor_without_bf16_has_no_rate_for_it(measured, tmp_path, monkeypatch):
    roofline.rates(tmp_path, 2, silent)
    monkeypatch.setattr(hardware, "processor", lambda: {"cpu": "made", "isa": ["avx2"]})
    assert "bf16_gmacs" not in roofline.rates(tmp_path, 2, silent)["torch"]
    assert len(measured) == 4


@pytest.mark.parametrize("package", ["torch", "onnxruntime"])
def test_rates_of_other_versions_are_measured_anew(measured, tmp_path, monkeypatch, package):
    roofline.rates(tmp_path, 2, silent)
    now = {"torch": "2", "onnxruntime": "1", **hardware.versions(), package: "0.1"}
    monkeypatch.setattr(hardware, "versions", lambda: now)
    roofline.rates(tmp_path, 2, silent)
    assert len(measured) == 4


def test_rates_of_another_number_of_cores_are_measured_anew(measured, tmp_path, monkeypatch):
    roofline.rates(tmp_path, 2, silent)
    monkeypatch.setattr(hardware, "cores", lambda: 97)
    roofline.rates(tmp_path, 2, silent)
    assert len(measured) == 4


def change(body, value):
    body["rates"]["onnx"]["int8_gmacs"] = value
    return json.dumps(body)


DAMAGE = {
    "empty": lambda body: "",
    "truncated": lambda body: json.dumps(body)[:-20],
    "binary": lambda body: "\x00\x01",
    "nested": lambda body: "[" * 100_000,
    "a list": lambda body: "[1]",
    "null": lambda body: "null",
    "nan": lambda body: change(body, math.nan),
    "infinite": lambda body: change(body, math.inf),
    "negative": lambda body: change(body, -1.0),
    "zero": lambda body: change(body, 0.0),
    "text": lambda body: change(body, "fast"),
    "true": lambda body: change(body, True),
    "huge": lambda body: change(body, 10**400),
    "a list of rates": lambda body: json.dumps({**body, "rates": ["torch", "onnx"]}),
    "no rates": lambda body: json.dumps({k: v for k, v in body.items() if k != "rates"}),
    "no runtime": lambda body: json.dumps({**body, "rates": {"torch": body["rates"]["torch"]}}),
    "no precision": lambda body: json.dumps({**body, "rates": {**body["rates"], "onnx": {"fp32_gmacs": 1.0}}}),
    "no schema": lambda body: json.dumps({k: v for k, v in body.items() if k != "schema"}),
    "another schema": lambda body: json.dumps({**body, "schema": 0}),
    "other threads": lambda body: json.dumps({**body, "threads": 7}),
    "one runtime more": lambda body: json.dumps({**body, "rates": {**body["rates"], "tpu": {"fp32_gmacs": 1.0}}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_anew(measured, tmp_path, damage):
    file = tmp_path / "roofline-2.json"
    roofline.rates(tmp_path, 2, silent)
    whole = json.loads(file.read_text())
    file.write_text(DAMAGE[damage](whole))
    again = roofline.rates(tmp_path, 2, silent)
    assert len(measured) == 4
    assert json.loads(file.read_text()) == {**whole, "rates": again}


def test_a_failed_calibration_leaves_no_file(measured, tmp_path, monkeypatch):
    def fail(*_):
        raise BenchError("No.")

    monkeypatch.setattr(roofline, "_run_probe", fail)
    with pytest.raises(BenchError):
        roofline.rates(tmp_path, 2, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_calibration(tmp_path):
    for runtime in ("torch", "onnx"):
        found = roofline._run_probe(runtime, ["int8"], 1, 0.001, 1)
        assert set(found) == {"int8_gmacs", "int8_gb_s"}
        assert all(1 < value < 1e5 for value in found.values())


def test_a_calibration_that_fails_says_why(monkeypatch, tmp_path):
    with pytest.raises(BenchError, match="KeyError: 'abacus'"):
        roofline._run_probe("abacus", ["int8"], 1, 0.001, 1)
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(sleeper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(roofline.sys, "executable", str(sleeper))
    monkeypatch.setattr(roofline, "TIMEOUT_S", 0.2)
    with pytest.raises(BenchError, match="did not end"):
        roofline._run_probe("torch", ["int8"], 1, 0.001, 1)


def test_the_int8_ceiling_is_of_the_operator_our_files_use():
    kinds = passes.facts(machine_probe.build_graph("int8", 2))
    assert kinds["operators"] == {"DynamicQuantizeMatMul": 2, "Gather": 1}
    assert kinds["bytes_by_dtype"]["int8"] == 2 * machine_probe.WIDTH * (machine_probe.WIDTH + 1)  # with zero points
    assert passes.facts(machine_probe.build_graph("fp32", 1))["operators"] == {"Gather": 1, "MatMul": 1}
