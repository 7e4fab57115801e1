"""Tests of CUDA graphs: the lengths, the padding, the recorded graphs, and the refusals.

Only the tests with the marker `gpu` need a GPU.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import onnxruntime as ort
import pytest
import torch
from exit_graphs import add_exits, make_head
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as state
from session_on_host import pretend_cuda
from torch._dynamo.utils import counters

from toolchain import passes
from toolchain.backends import Place, compiled, open_session
from toolchain.backends.compiled import RECORDING_RUNS
from toolchain.backends.graph_lengths import LENGTHS, find_length, graph_lengths, pad_text, remove_padding
from toolchain.build.pipeline import ensure
from toolchain.errors import ArtifactError, DeviceMemoryError, GraphError, ProviderError
from toolchain.results.providers import CUDA_GRAPHS, PROVIDERS, includes, is_on_gpu

PLACE = Place(CUDA_GRAPHS, 1)
NO_GRAPH = -1
tokens_and_limits = st.integers(1, 2048).flatmap(lambda limit: st.tuples(st.integers(1, limit), st.just(limit)))


def batch(rows, tokens, seed=0):
    ids = np.random.default_rng(seed).integers(1000, 20000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture
def cuda(monkeypatch):
    """Makes ONNX Runtime report a GPU, although every session runs on the CPU."""
    return pretend_cuda(monkeypatch)


@pytest.fixture
def on_cpu(built_tiny):
    """A session without graphs; it must open before the fixture `cuda` replaces ONNX Runtime's session."""
    return open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 1))


@given(tokens_and_limits)
def test_a_text_gets_the_smallest_length_that_fits_and_never_more_than_the_models_limit(pair):
    tokens, limit = pair
    lengths = graph_lengths(limit)
    assert all(shorter < longer for shorter, longer in pairwise(lengths))
    assert lengths[-1] == min(limit, LENGTHS[-1])
    length = find_length(batch(1, tokens), lengths)
    if tokens > LENGTHS[-1]:
        assert length is None
        return
    assert length in lengths
    assert tokens <= length <= limit
    assert not [each for each in lengths if tokens <= each < length]
    assert length - tokens <= max(7, tokens / 2)


@given(st.integers(1, 2048), st.integers(1, 511))
def test_a_longer_text_never_gets_a_shorter_length(limit, tokens):
    lengths = graph_lengths(limit)
    shorter, longer = (find_length(batch(1, each), lengths) for each in (tokens, tokens + 1))
    assert longer is None or (shorter is not None and shorter <= longer)


def test_a_batch_of_several_texts_has_no_graph():
    assert find_length(batch(2, 8), graph_lengths(512)) is None


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 33, 70])
def test_padding_changes_no_logit(on_cpu, tokens):
    text = batch(1, tokens)
    for length in (each for each in LENGTHS if each >= tokens):
        padded = pad_text(text, length)
        assert padded["input_ids"].shape == padded["attention_mask"].shape == (1, length)
        assert np.abs(on_cpu.run(padded) - on_cpu.run(text)).max() < 1e-5


def test_only_a_token_classifier_has_logits_of_padding():
    assert remove_padding(np.zeros((1, 8, 3)), 5).shape == (1, 5, 3)
    assert remove_padding(np.zeros((1, 3)), 2).shape == (1, 3)


def test_each_length_has_one_graph_with_the_logits_of_the_cpu(built_tiny, on_cpu, cuda):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", Place(CUDA_GRAPHS, 1, device_id=1))
    lengths = graph_lengths(built_tiny.load("onnx-fp32").manifest.max_length)
    assert cuda.options[-1] == [("CUDAExecutionProvider", {"device_id": "1", "enable_cuda_graph": "1"})]
    # For each length, a run without a graph gives the shape of the logits, and the next run records the graph.
    assert cuda.numbers == [number for length in reversed(lengths) for number in (NO_GRAPH, length)]
    assert set(cuda.devices) == {("cuda", 1)}
    device_values = len(cuda.devices)
    cuda.numbers.clear()
    texts = [batch(1, tokens, seed) for seed, tokens in enumerate((3, 8, 9, 3, 64, 65, 500))]
    logits = [session.run(text) for text in texts]
    assert cuda.numbers == [8, 8, 16, 8, 64, 96, 512]
    assert len(cuda.devices) == device_values  # a replay uses the memory of its graph
    for text, answer in zip(texts, logits, strict=True):
        assert np.abs(answer - on_cpu.run(text)).max() < 1e-5
    assert session.facts()["graph_lengths"] == list(lengths)
    assert session.facts()["provider"] == "CUDAExecutionProvider"
    session.close()


def test_a_batch_without_a_graph_runs_as_on_cuda(built_tiny, on_cpu, cuda):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", PLACE)
    cuda.numbers.clear()
    np.testing.assert_array_equal(session.run(batch(3, 9)), on_cpu.run(batch(3, 9)))
    session.resident(batch(3, 9))()
    session.outputs(batch(1, 9))
    assert cuda.numbers == [NO_GRAPH] * 3


def test_a_resident_text_is_replayed_without_copies(built_tiny, cuda):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", PLACE)
    run_model = session.resident(batch(1, 20))
    device_values = len(cuda.devices)
    cuda.numbers.clear()
    run_model()
    run_model()
    assert cuda.numbers == [24, 24]
    assert len(cuda.devices) == device_values


def test_threads_take_turns_because_they_share_the_inputs_of_a_graph(built_tiny, on_cpu, cuda, monkeypatch):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", PLACE)
    replay, is_busy = cuda.run_with_iobinding, threading.Event()

    def replay_slowly(*arguments):
        assert not is_busy.is_set()
        is_busy.set()
        time.sleep(0.002)
        replay(*arguments)
        is_busy.clear()

    monkeypatch.setattr(cuda, "run_with_iobinding", replay_slowly)
    texts = [batch(1, 8, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(session.run, texts))
    for text, logits in zip(texts, answers, strict=True):
        assert np.abs(logits - on_cpu.run(text)).max() < 1e-5


def refuse(*_, **__):
    raise state.Fail("[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature.")


def test_a_graph_that_branches_is_refused(built_tiny, tmp_path, cuda, monkeypatch):
    model = add_exits(built_tiny.path("onnx-fp32") / "model.onnx", make_head(1))
    passes.write(model, tmp_path / "model.onnx")
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(
        ProviderError, match=r"A CUDA graph cannot branch, and .*model.onnx has the operator If"
    ) as error:
        open_session(tmp_path, "onnx", PLACE)
    assert error.value.hint == "Use the variant without exits."


def test_a_model_that_cannot_be_recorded_is_refused_with_the_cause(built_tiny, cuda, monkeypatch):
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match=r"cannot record CUDA graphs of .*: This session cannot use") as error:
        open_session(built_tiny.path("onnx-fp32"), "onnx", PLACE)
    assert "--provider cuda" in error.value.hint


def test_a_damaged_model_is_not_reported_as_one_without_graphs(tmp_path, cuda, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(GraphError, match="is not a valid ONNX model"):
        open_session(tmp_path, "onnx", PLACE)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (state.Fail("CUDA failure 900: operation not permitted when stream is capturing"), ProviderError),
        (state.EPFail("CUDA graph launch error: invalid argument"), ProviderError),
        (state.Fail("CUDA failure 2: out of memory ; GPU=0"), DeviceMemoryError),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), DeviceMemoryError),
    ],
)
def test_an_error_during_the_recording_is_translated(built_tiny, cuda, monkeypatch, error, kind):
    run = cuda.run_with_iobinding

    def fail_while_recording(session, binding, options):
        if int(options.get_run_config_entry("gpu_graph_id")) != NO_GRAPH:
            raise error
        run(session, binding, options)

    monkeypatch.setattr(cuda, "run_with_iobinding", fail_while_recording)
    with pytest.raises(kind):
        open_session(built_tiny.path("onnx-fp32"), "onnx", PLACE)


def test_operators_on_the_cpu_are_refused_even_if_a_fallback_is_allowed(built_tiny, cuda):
    cuda.cpu_operators = ("Gelu",)
    with pytest.raises(ProviderError, match="no kernel for 1 Gelu") as error:
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place(CUDA_GRAPHS, 1, allow_fallback=True))
    assert "--provider cuda --allow-fallback" in error.value.hint


def test_a_runtime_without_graphs_is_refused(built_tiny):
    with pytest.raises(ProviderError, match="This runtime does not run on cuda-graphs") as error:
        open_session(built_tiny.path("torch-fp32"), "torch", PLACE)
    assert error.value.hint == "Use the provider cuda, or another variant."


def test_a_folder_without_a_manifest_is_refused(built_tiny, tmp_path, cuda):
    (tmp_path / "model.onnx").write_bytes((built_tiny.path("onnx-fp32") / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        open_session(tmp_path, "onnx", PLACE)


def test_cuda_includes_cuda_graphs_and_nothing_else_includes_another_provider():
    chosen = {each: [provider for provider in PROVIDERS if includes(each, provider)] for each in PROVIDERS}
    assert chosen.pop("cuda") == ["cuda", CUDA_GRAPHS]
    assert chosen == {each: [each] for each in PROVIDERS if each != "cuda"}
    assert [provider for provider in (*PROVIDERS, "OpenVINO CPU") if is_on_gpu(provider)] == [*PROVIDERS[1:]]


class RecordedModel(torch.nn.Module):
    """A model that appends the compiler's settings and the shape of each call to a list."""

    def __init__(self, model, options, calls):
        super().__init__()
        self.model, self.config, self.options, self.calls = model, model.config, dict(options or {}), calls

    def forward(self, **inputs):
        self.calls.append((self.options, tuple(inputs["input_ids"].shape)))
        return self.model(**inputs)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Replaces PyTorch's compiler by a recorder of calls, and the GPU by the CPU; returns the list of the calls."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, options: RecordedModel(model, options, calls))
    monkeypatch.setattr("toolchain.backends.pytorch.device", lambda place: torch.device("cpu"))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    return calls


def test_compiled_pytorch_records_and_replays_graphs_of_the_same_lengths(built_tiny, fake_compiler):
    session = open_session(built_tiny.path("torch-fp32"), "torch-compile", PLACE)
    lengths = graph_lengths(built_tiny.load("torch-fp32").manifest.max_length)
    graphs = {"triton.cudagraphs": True}
    assert fake_compiler == [(graphs, (1, n)) for n in reversed(lengths) for _ in range(RECORDING_RUNS)]
    fake_compiler.clear()
    eager = open_session(built_tiny.path("torch-fp32"), "torch", Place("cpu", 1))
    for rows, tokens in ((1, 5), (1, 65), (2, 5)):
        logits = session.run(batch(rows, tokens))
        assert np.abs(logits - eager.run(batch(rows, tokens))).max() < 1e-5
    session.resident(batch(1, 5))()
    assert fake_compiler == [(graphs, (1, 8)), (graphs, (1, 96)), ({}, (2, 5)), (graphs, (1, 8)), (graphs, (1, 8))]
    fake_compiler.clear()
    session._lengths = (8,)
    session.run(batch(1, 9))
    assert fake_compiler == [({}, (1, 9))]  # a text above the last length has no graph
    session._lengths = lengths
    facts = session.facts()
    assert facts["compiled"] == "dynamic shapes, CUDA graphs"
    assert facts["graph_lengths"] == list(lengths)
    session.close()


def test_a_model_without_graphs_is_refused_although_the_compiler_runs_it(built_tiny, fake_compiler, monkeypatch):
    run = RecordedModel.forward

    def skip_one_length(self, **inputs):
        if inputs["input_ids"].shape[1] == 256:
            counters["inductor"]["cudagraph_skips"] += 1
        return run(self, **inputs)

    monkeypatch.setattr(RecordedModel, "forward", skip_one_length)
    with pytest.raises(ProviderError, match="records no CUDA graphs of a part of this model") as error:
        open_session(built_tiny.path("torch-fp32"), "torch-compile", PLACE)
    assert "--provider cuda" in error.value.hint
    assert fake_compiler[-1][1] == (1, 256)


def test_an_error_of_pytorch_during_the_recording_is_translated(built_tiny, fake_compiler, monkeypatch):
    def fail(self, **inputs):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(RecordedModel, "forward", fail)
    with pytest.raises(ProviderError, match=r"cannot record CUDA graphs of this model: .* operation not permitted"):
        open_session(built_tiny.path("torch-fp32"), "torch-compile", PLACE)


@pytest.mark.slow
def test_the_compiler_itself_reports_a_model_without_graphs(built_tiny, monkeypatch):
    # On the CPU, PyTorch compiles the model and has no CUDA graphs.
    monkeypatch.setattr("toolchain.backends.pytorch.device", lambda place: torch.device("cpu"))
    with pytest.raises(ProviderError, match="records no CUDA graphs of a part of this model"):
        open_session(built_tiny.path("torch-fp32"), "torch-compile", PLACE)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available(),
    reason="needs a CUDA device and onnxruntime-gpu",
)
def test_graphs_on_a_gpu_give_the_logits_without_graphs(tiny):
    path = ensure(tiny, ["onnx-fp16"], {}, lambda line: None)["onnx-fp16"].path
    with_graphs, without = (open_session(path, "onnx", Place(provider, 1)) for provider in (CUDA_GRAPHS, "cuda"))
    for seed, tokens in enumerate((3, 8, 9, 3, 64, 65, 500)):
        text = batch(1, tokens, seed)
        assert np.abs(with_graphs.run(text) - without.run(text)).max() < 1e-2
        with_graphs.resident(text)()
    assert np.abs(with_graphs.run(batch(4, 9)) - without.run(batch(4, 9))).max() < 1e-2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_compiled_graphs_on_a_gpu_give_the_logits_of_eager_pytorch(built_tiny):
    compiled_session = open_session(built_tiny.path("torch-fp32"), "torch-compile", PLACE)
    eager = open_session(built_tiny.path("torch-fp32"), "torch", Place("cuda", 1))
    for rows, tokens in ((1, 3), (1, 65), (2, 9), (1, 3)):
        logits = compiled_session.run(batch(rows, tokens))
        assert np.abs(logits - eager.run(batch(rows, tokens))).max() < 1e-2  # TF32
    compiled_session.close()
