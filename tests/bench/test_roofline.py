"""Tests of the lower bound on latency, which follows from a model's multiply-accumulates and a machine's rates."""

import copy
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


def count_in_pytorch(model, tokens):
    """Returns the multiply-accumulates of products with weights and of products of activations.

    The function counts the multiply-accumulates of the operators that PyTorch calls.
    """
    model.eval().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((1, tokens), dtype=torch.long))
    counts = Counter()
    for operator, count in counter.get_flop_counts()["Global"].items():
        counts["activations" if "bmm" in str(operator) else "weights"] += count // 2
    return counts


@pytest.mark.parametrize("model", ["built_tiny", pytest.param("reference", marks=pytest.mark.slow)])
def test_work_equals_the_multiply_accumulates_that_pytorch_computes(model, request):
    folder = request.getfixturevalue(model).path("torch-fp32")
    model_work, model_loaded = read_work(folder), load_model(folder)
    assert [model_work.macs(n) for n in LENGTHS] == [count_in_pytorch(model_loaded, n).total() for n in LENGTHS]
    assert (
        model_work.macs(TOKENS) - model_work.head_parameters
        == EncoderSizes.from_model(model_loaded).multiply_accumulates
    )


@pytest.mark.parametrize("shapes", [[(3, 40), (1, 8)], [(0, 8), (2, 0)], [(1, 0), (0, 24)], [(2, 8), (0, 0)]])
def test_work_of_a_pruned_model_equals_what_pytorch_computes(built_tiny, tmp_path, shapes):
    source = built_tiny.path("torch-fp32")
    pruned_model = load_model(source)
    architectures.reshape(pruned_model, [LayerShape(*shape) for shape in shapes])
    save_weights(pruned_model.state_dict(), tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    model_work = read_work(tmp_path)
    assert model_work.macs(TOKENS) == count_in_pytorch(pruned_model, TOKENS).total()
    assert (
        model_work.macs(TOKENS) - model_work.head_parameters
        == EncoderSizes.from_model(pruned_model).multiply_accumulates
    )


def count_in_graph(path, tokens):
    """Returns the multiply-accumulates of all products with weights.

    The function runs the graph to find how many token vectors each product receives.
    """
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
    inputs = session.run(names, {tensor.name: ones for tensor in session.get_inputs()})
    return sum(
        value.size // value.shape[-1] * math.prod(weights[node.input[1]])
        for value, node in zip(inputs, products, strict=True)
    )


@pytest.mark.parametrize("model", ["built_tiny", pytest.param("reference", marks=pytest.mark.slow)])
def test_reading_only_the_first_token_lowers_the_work_as_in_the_graph(model, request):
    workspace = request.getfixturevalue(model)
    model_work = read_work(workspace.path("torch-fp32"))
    for tokens in LENGTHS:
        attention = 2 * tokens**2 * sum(model_work.attention_widths)
        assert count_in_graph(workspace.path("onnx-std") / "model.onnx", tokens) == model_work.macs(tokens) - attention
        # In onnx-fp32, the last attention node has a single query.
        attention -= 2 * tokens * (tokens - 1) * model_work.attention_widths[-1]
        assert (
            count_in_graph(workspace.path("onnx-fp32") / "model.onnx", tokens)
            == model_work.macs(tokens, True, True) - attention
        )


def test_work_after_the_last_attention_can_span_layers(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    pruned_model = load_model(source)
    architectures.reshape(pruned_model, [LayerShape(2, 8), LayerShape(0, 24)])
    save_weights(pruned_model.state_dict(), tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    width, head = 32, 8
    assert read_work(tmp_path).tail_parameters == width * (2 * head + 2 * 8 + 2 * 24)


@pytest.mark.parametrize("shapes", [None, [(2, 8), (0, 24), (1, 16)]])
def test_work_before_an_exit_equals_what_pytorch_computes(built_tiny, tmp_path, shapes):
    """An exit is before a layer with attention, and may be after a layer without attention."""
    source = built_tiny.path("torch-fp32")
    model = load_model(source)
    blocks = model.distilbert.transformer.layer
    if shapes:
        blocks.append(copy.deepcopy(blocks[0]))
        model.config.n_layers = len(blocks)
        architectures.reshape(model, [LayerShape(*shape) for shape in shapes])
    save_weights(model.state_dict(), tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    model_work = read_work(tmp_path)
    for layer, layers_before in enumerate([0, 2] if shapes else [0, 1]):
        model.distilbert.transformer.layer = blocks[:layers_before]
        for tokens in LENGTHS:
            counted = count_in_pytorch(model, tokens).total() - model_work.head_parameters
            assert model_work.macs_before_exit(layer, tokens) == counted
    assert model_work.macs_before_exit(2, 1) is None


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "mobilebert"])
def test_work_of_any_encoder_equals_what_pytorch_computes(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = {**SMALL, "vocab_size": 2000, "embedding_size": 8}
    if kind == "mobilebert":
        settings |= {"true_hidden_size": 16, "intra_bottleneck_size": 16}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(tmp_path)
    model_work = read_work(tmp_path)
    for tokens in LENGTHS:
        counts = count_in_pytorch(model, tokens)
        attention = counts["activations"] if kind in architectures.LAYOUTS else 0
        assert model_work.macs(tokens) == counts["weights"] + attention
    assert (sum(model_work.attention_widths) > 0) == (kind in architectures.LAYOUTS)


def test_work_of_an_unknown_architecture_counts_its_linear_layers(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    tensors = load_file(source / checkpoints.WEIGHTS)
    renamed_tensors = {name.replace("distilbert.transformer", "mystery.stack"): t for name, t in tensors.items()}
    renamed_tensors = {name.replace("distilbert.", "mystery."): t for name, t in renamed_tensors.items()}
    save_file(renamed_tensors, tmp_path / checkpoints.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mystery"}))
    known_work = read_work(source)
    assert read_work(tmp_path) == Work(known_work.linear_parameters, (), known_work.head_parameters)
    assert read_work(tmp_path).macs_before_exit(0, 1) is None
    assert read_work(tmp_path).macs(9, first_token=True, first_query=True) == read_work(tmp_path).macs(9)


def test_work_is_unknown_without_weights_or_with_shared_layers(built_tiny, tmp_path):
    assert read_work(tmp_path) is None
    assert read_work(built_tiny.path("onnx-int8")) is None
    shutil.copyfile(built_tiny.path("torch-fp32") / checkpoints.WEIGHTS, tmp_path / checkpoints.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    assert read_work(tmp_path) is None


def test_unreadable_weights_raise_a_checkpoint_error(built_tiny, tmp_path):
    source = built_tiny.path("torch-fp32")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    (tmp_path / checkpoints.WEIGHTS).write_bytes((source / checkpoints.WEIGHTS).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_work(tmp_path)


def test_weight_bytes_leave_out_the_embedding_tables(built_tiny):
    model_work = read_work(built_tiny.path("torch-fp32"))
    parameters = model_work.linear_parameters + model_work.head_parameters
    for variant, bytes_per_weight in (("torch-fp32", 4), ("onnx-fp32", 4), ("onnx-int8", 1)):
        size = weight_bytes(store.load(built_tiny.path(variant)).manifest.facts)
        # `size` includes biases, LayerNorm parameters and scales besides the weights
        assert bytes_per_weight * parameters < size < bytes_per_weight * parameters + 20_000
    assert weight_bytes({}) is None
    assert weight_bytes({"bytes_by_part": {"encoder": 1}}) is None


RATES = {"fp32_gmacs": 100.0, "fp32_gb_s": 10.0, "int8_gmacs": 400.0, "int8_gb_s": 10.0}


def test_the_floor_is_the_larger_of_compute_time_and_memory_time():
    assert floor_ms(1e9, 1e6, RATES, "fp32") == 10.0  # 10⁹ multiply-accumulates at 10¹¹ per second take 10 ms
    assert floor_ms(1e9, 1e6, RATES, "int8") == 2.5
    assert floor_ms(1e9, 80e6, RATES, "int8") == 8.0  # 80 MB at 10 GB per second take 8 ms
    assert [floor_ms(1e9, 1e6, RATES, precision) for precision in ("bf16", "fp16", "nf4")] == [None] * 3


AMOUNT = st.floats(0, 1e15)


@given(AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.sampled_from(["fp32", "int8"]))
def test_more_work_never_lowers_the_floor(macs, size, more_macs, more_bytes, precision):
    floor = floor_ms(macs, size, RATES, precision)
    assert floor_ms(macs + more_macs, size + more_bytes, RATES, precision) >= floor >= 0


@pytest.fixture
def calls(monkeypatch):
    """Replaces the machine probe by a fake for a processor with bf16, and returns the list of calls of the fake."""
    calls = []

    def measure(runtime, precisions, threads, seconds, mebibytes):
        calls.append((runtime, threads))
        return {f"{p}_{unit}": 2.0 + len(calls) for p in precisions for unit in ("gmacs", "gb_s")}

    monkeypatch.setattr(roofline, "_run_probe", measure)
    monkeypatch.setattr(hardware, "processor", lambda: {"cpu": "made", "isa": ["avx512_bf16"]})
    return calls


def no_progress(*_):
    pass


def test_rates_are_measured_once_per_number_of_threads(calls, tmp_path):
    progress_calls = []
    first = roofline.rates(tmp_path / "new", 2, lambda *progress: progress_calls.append(progress))
    assert set(first["torch"]) == {f"{p}_{u}" for p in ("fp32", "bf16", "int8") for u in ("gmacs", "gb_s")}
    assert set(first["onnx"]) == {f"{p}_{u}" for p in ("fp32", "int8") for u in ("gmacs", "gb_s")}
    assert [(done, total) for done, total, _ in progress_calls] == [(0, 2), (1, 2)]
    assert roofline.rates(tmp_path / "new", 2, no_progress) == first
    assert calls == [("torch", 2), ("onnx", 2)]
    roofline.rates(tmp_path / "new", 1, no_progress)
    assert calls[2:] == [("torch", 1), ("onnx", 1)]
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["roofline-1.json", "roofline-2.json"]


def test_a_processor_without_bf16_has_no_rate_for_it(calls, tmp_path, monkeypatch):
    roofline.rates(tmp_path, 2, no_progress)
    monkeypatch.setattr(hardware, "processor", lambda: {"cpu": "made", "isa": ["avx2"]})
    assert "bf16_gmacs" not in roofline.rates(tmp_path, 2, no_progress)["torch"]
    assert len(calls) == 4


@pytest.mark.parametrize("package", ["torch", "onnxruntime"])
def test_rates_are_measured_again_after_a_package_changes(calls, tmp_path, monkeypatch, package):
    roofline.rates(tmp_path, 2, no_progress)
    versions = {"torch": "2", "onnxruntime": "1", **hardware.versions(), package: "0.1"}
    monkeypatch.setattr(hardware, "versions", lambda: versions)
    roofline.rates(tmp_path, 2, no_progress)
    assert len(calls) == 4


def test_rates_are_measured_again_after_the_number_of_cores_changes(calls, tmp_path, monkeypatch):
    roofline.rates(tmp_path, 2, no_progress)
    monkeypatch.setattr(hardware, "cores", lambda: 97)
    roofline.rates(tmp_path, 2, no_progress)
    assert len(calls) == 4


def with_rate(body, value):
    body["rates"]["onnx"]["int8_gmacs"] = value
    return json.dumps(body)


DAMAGE = {
    "empty": lambda body: "",
    "truncated": lambda body: json.dumps(body)[:-20],
    "binary": lambda body: "\x00\x01",
    "nested": lambda body: "[" * 100_000,
    "a list": lambda body: "[1]",
    "null": lambda body: "null",
    "nan": lambda body: with_rate(body, math.nan),
    "infinite": lambda body: with_rate(body, math.inf),
    "negative": lambda body: with_rate(body, -1.0),
    "zero": lambda body: with_rate(body, 0.0),
    "text": lambda body: with_rate(body, "fast"),
    "true": lambda body: with_rate(body, True),
    "huge": lambda body: with_rate(body, 10**400),
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
def test_rates_are_measured_again_where_their_file_is_damaged(calls, tmp_path, damage):
    file = tmp_path / "roofline-2.json"
    roofline.rates(tmp_path, 2, no_progress)
    original = json.loads(file.read_text())
    file.write_text(DAMAGE[damage](original))
    rates = roofline.rates(tmp_path, 2, no_progress)
    assert len(calls) == 4
    assert json.loads(file.read_text()) == {**original, "rates": rates}


def test_rates_are_measured_where_the_cache_cannot_be_written(calls, tmp_path):
    (tmp_path / "file").write_text("")
    rates = roofline.rates(tmp_path / "file" / "cache", 2, no_progress)
    assert rates.keys() == {"torch", "onnx"}
    assert len(calls) == 2


def test_a_failed_machine_probe_writes_no_file(calls, tmp_path, monkeypatch):
    def fail(*_):
        raise BenchError("No.")

    monkeypatch.setattr(roofline, "_run_probe", fail)
    with pytest.raises(BenchError):
        roofline.rates(tmp_path, 2, no_progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_machine_probe_measures_plausible_rates(tmp_path):
    for runtime in ("torch", "onnx"):
        rates = roofline._run_probe(runtime, ["int8"], 1, 0.001, 1)
        assert set(rates) == {"int8_gmacs", "int8_gb_s"}
        assert all(1 < value < 1e5 for value in rates.values())


def test_a_failed_machine_probe_gives_its_reason(monkeypatch, tmp_path):
    with pytest.raises(BenchError, match="KeyError: 'abacus'"):
        roofline._run_probe("abacus", ["int8"], 1, 0.001, 1)
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(sleeper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(roofline.sys, "executable", str(sleeper))
    monkeypatch.setattr(roofline, "TIMEOUT_S", 0.2)
    with pytest.raises(BenchError, match="did not end"):
        roofline._run_probe("torch", ["int8"], 1, 0.001, 1)


def test_the_machine_probe_uses_the_int8_operator_of_onnx_int8():
    facts = passes.facts(machine_probe.build_graph("int8", 2))
    assert facts["operators"] == {"DynamicQuantizeMatMul": 2, "Gather": 1}
    # the bytes of int8 tensors include the zero points
    assert facts["bytes_by_dtype"]["int8"] == 2 * machine_probe.WIDTH * (machine_probe.WIDTH + 1)
    assert passes.facts(machine_probe.build_graph("fp32", 1))["operators"] == {"Gather": 1, "MatMul": 1}
