"""Tests of CUDA: provider and GPU choice, fallbacks, and memory figures.

Only the tests with the marker `gpu` need a GPU.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pynvml
import pytest
import torch
from session_on_host import REAL_SESSION, pretend_cuda

from toolchain.backends import Backend, Place, open_session
from toolchain.backends.ort import OrtSession
from toolchain.backends.pytorch import TorchSession, _has_kernels, device, translate_memory_error
from toolchain.bench import gpu_memory, run
from toolchain.bench import runner as bench_module
from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import ensure
from toolchain.cli import main
from toolchain.compare.report.columns import CELL, columns
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import compare
from toolchain.data import encoding, inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, DeviceMemoryError, ProviderError
from toolchain.results.result_file import ResultFile
from toolchain.system import hardware

BATCH = encoding.pad([[101, 2023, 102], [101, 102]], ("input_ids", "attention_mask"), 0)
T4 = {"name": "Tesla T4", "memory_bytes": 16 << 30, "compute_capability": "7.5"}
FAKE = {"fake": Backend("fake_backend:FakeSession", ("json",))}


@pytest.fixture
def cuda(monkeypatch):
    """Makes ONNX Runtime report a GPU, although every session runs on the CPU."""
    return pretend_cuda(monkeypatch)


def test_an_onnx_session_binds_tensors_to_its_gpu_and_gives_the_cpu_logits(built_tiny, cuda, monkeypatch):
    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1, device_id=1))
    logits = session.run(BATCH)
    assert set(cuda.devices) == {("cuda", 1)}
    assert len(cuda.devices) == 3  # the session binds two inputs and one output
    assert cuda.options == ["preloaded", [("CUDAExecutionProvider", {"device_id": "1"})]]
    session.resident(BATCH)()
    assert len(cuda.devices) == 6
    facts = session.facts()
    assert facts["provider"] == "CUDAExecutionProvider"
    assert facts["nodes"]["CUDAExecutionProvider"] > facts["nodes"]["CPUExecutionProvider"] == 2
    assert "fallback" not in facts
    monkeypatch.undo()
    on_cpu = open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 1))
    np.testing.assert_array_equal(logits, on_cpu.run(BATCH))


def test_a_node_without_a_gpu_kernel_is_refused_or_reported_as_a_fallback(built_tiny, cuda):
    cuda.cpu_operators = ("DynamicQuantizeMatMul", "DynamicQuantizeMatMul", "Gelu")
    with pytest.raises(ProviderError, match="no kernel for 2 DynamicQuantizeMatMul, 1 Gelu"):
        OrtSession(built_tiny.path("onnx-int8"), Place("cuda", 1))
    session = OrtSession(built_tiny.path("onnx-int8"), Place("cuda", 1, allow_fallback=True))
    assert session.facts()["fallback"].startswith("3 of ")
    assert session.facts()["fallback"].endswith("nodes run on the CPU")


def test_a_session_that_falls_back_entirely_is_refused_or_reported(built_tiny, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: REAL_SESSION(path, options, ["CPUExecutionProvider"])
    )
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(ProviderError, match="uses CPUExecutionProvider instead"):
        OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1))
    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1, allow_fallback=True))
    assert session.facts()["fallback"] == "runs on CPUExecutionProvider, not on CUDAExecutionProvider"
    assert session.run(BATCH).shape == (2, 2)
    session.resident(BATCH)()


@pytest.mark.parametrize(
    ("message", "memory_text"),
    [
        ("Failed to allocate memory for requested buffer of size 2147483648", "memory for the requested 2,048 MiB"),
        (
            "Available memory of 1048576 is smaller than requested bytes of 2147483648",
            "memory for the requested 2,048 MiB",
        ),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);", "memory"),
    ],
)
def test_a_memory_error_of_onnx_runtime_gives_the_requested_size(built_tiny, cuda, message, memory_text):
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1))

    def raise_memory_error(binding, options):
        raise RuntimeException(message)

    session._session.run_with_iobinding = raise_memory_error
    with pytest.raises(DeviceMemoryError, match=f"too little {memory_text}"):
        session.run(BATCH)


def test_a_memory_error_of_pytorch_gives_the_requested_size():
    with (
        pytest.raises(DeviceMemoryError, match="too little memory for the requested 20 MiB"),
        translate_memory_error(torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …")


def test_a_resident_pytorch_batch_gives_the_logits_of_run(built_tiny):
    session = TorchSession(built_tiny.path("torch-fp32"), Place("cpu", 1))
    answer = session.resident(BATCH)
    np.testing.assert_array_equal(answer().numpy(), session.run(BATCH))


@pytest.mark.parametrize(
    ("capability", "architectures", "supported"),
    [
        # The next case is a GTX 1050 Ti with a PyTorch build for CUDA 13.
        ((6, 1), ["sm_75", "sm_80", "sm_90", "compute_120"], False),
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),
        ((7, 5), ["sm_70", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        # The driver can compile the compute_90 code for a GPU of compute capability 12.0.
        ((12, 0), ["sm_80", "sm_90a", "compute_90"], True),
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((8, 9), [], True),  # this PyTorch build does not list its architectures
    ],
)
def test_a_gpu_without_kernels_in_the_pytorch_build_is_refused(monkeypatch, capability, architectures, supported):
    assert _has_kernels(capability, architectures) is supported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    if supported:
        assert device(Place("cuda", 1, device_id=1)) == torch.device("cuda:1")
    else:
        with pytest.raises(ProviderError, match=r"has no kernels for a GPU, compute capability \d+\.\d"):
            device(Place("cuda", 1))


@pytest.fixture
def nvml(monkeypatch):
    """Replaces NVML by a fake with one GPU; a test sets the memory figures of this GPU."""
    state = SimpleNamespace(used=1000, processes=[], queries=[])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: state.queries.append(index) or "gpu")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: state.queries.append(name) or "gpu")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=state.used))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: state.processes)
    return state


def test_gpu_memory_is_the_memory_of_this_process(nvml, monkeypatch):
    monkeypatch.setattr(gpu_memory.os, "getpid", lambda: 7)
    meter = gpu_memory.meter(0)
    nvml.processes = [SimpleNamespace(pid=7, usedGpuMemory=300), SimpleNamespace(pid=8, usedGpuMemory=5000)]
    assert (meter.read(), meter.method) == (300, gpu_memory.PROCESS)
    nvml.processes[0].usedGpuMemory = 200
    assert (meter.read(), meter.peak) == (200, 300)


@pytest.mark.parametrize("hidden", [[], [SimpleNamespace(pid=-1, usedGpuMemory=9)], None])
def test_gpu_memory_is_the_growth_on_the_device_where_processes_are_hidden(nvml, hidden):
    import os

    meter = gpu_memory.meter(0)
    # Some drivers list a process without the memory that the process uses.
    nvml.processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)] if hidden is None else hidden
    nvml.used = 1750
    assert (meter.read(), meter.method) == (750, gpu_memory.DIFFERENCE)


def test_gpu_memory_is_unknown_without_nvml(monkeypatch):
    def raise_not_found():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", raise_not_found)
    assert gpu_memory.meter(0) is None
    assert hardware.gpus() == ([], "")


@pytest.mark.parametrize(("visible", "query"), [("", 1), ("3,5", 5), ("GPU-aa,GPU-bb", "GPU-bb")])
def test_nvml_reads_the_gpu_that_cuda_visible_devices_selects(nvml, monkeypatch, visible, query):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu_memory.meter(1)
    assert nvml.queries == [query]


@pytest.fixture
def bench_cells(fake, monkeypatch):
    """Returns a function that benchmarks fake cells on CUDA; its keyword arguments map cell names to behaviours."""
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)
    encoder = Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)
    data = Data("fake", tuple(f"sentence number {i}" for i in range(40)), tuple(i % 2 for i in range(40)))
    protocol = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8, device_id=1)

    def measure(**behaviours):
        cells = [Cell("fake", name, "fake", "cuda", fake(name, **behaviour)) for name, behaviour in behaviours.items()]
        rows, run_facts = bench(cells, data, encoder, protocol, lambda *_: None, FAKE)
        return run.make_result(rows, run_facts, data, 512)

    return measure


def test_a_cuda_row_has_the_time_on_the_device_and_the_whole_latency(bench_cells, tmp_path):
    run = bench_cells(quick={"us": 900, "resident_us": 400})
    row = run.rows[0]
    assert 0.4 <= row.resident_ms["p50"] < row.latency_ms["p50"]
    assert row.resident.count == 40  # each sentence once
    assert row.facts["session"]["device_id"] == 1
    assert row.facts["session"]["device_order"] == "PCI_BUS_ID"
    assert run.run["device_id"] == 1
    run.write(tmp_path / "run.json")
    assert ResultFile.read(tmp_path / "run.json") == run
    comparison = compare([run])
    assert "on device p50 ms" in [column.header for column in columns(comparison)]
    assert any(line.startswith("On device:") for line in notes(comparison))


def test_a_memory_error_fails_its_own_row_and_gives_the_requested_size(bench_cells):
    rows = {row.variant: row for row in bench_cells(good={}, big={"ask_for": 3 << 30, "after": 20}).rows}
    assert rows["good"].status == "ok"
    assert (rows["big"].status, "3,072 MiB" in rows["big"].reason) == ("failed", True)


def test_a_comparison_marks_a_row_with_a_fallback(bench_cells):
    run = bench_cells(half={})
    facts = {**run.rows[0].facts, "session": {"fallback": "3 of 9 nodes run on the CPU", "note": "memory, not speed"}}
    run = dataclasses.replace(run, rows=(dataclasses.replace(run.rows[0], facts=facts),))
    comparison = compare([run])
    # If other processes used this machine during the test, the cell has the mark [noisy] besides the mark [fallback].
    assert CELL.text(comparison[0]).removesuffix(" [noisy]") == "half@cuda ◆ [fallback]"
    assert {
        "half@cuda: 3 of 9 nodes run on the CPU.",
        "half@cuda: The purpose of this quantisation is to improve memory, not speed.",
    } <= set(notes(comparison))


def test_a_comparison_shows_gpu_memory_and_how_it_was_measured(bench_cells):
    run = bench_cells(one={})
    memory = {**run.rows[0].memory_bytes, "gpu": {"load": 1, "peak": 300_000_000, "method": gpu_memory.DIFFERENCE}}
    run = dataclasses.replace(run, rows=(dataclasses.replace(run.rows[0], memory_bytes=memory),))
    comparison = compare([run])
    assert next(c.text(comparison[0]) for c in columns(comparison) if c.name == "GPU memory") == "300"
    assert f"GPU peak: {gpu_memory.DIFFERENCE}." in notes(comparison)


def test_cells_that_fall_back_are_planned_only_with_allow_fallback():
    with pytest.raises(BenchError, match="onnx-int8 does not run on cuda") as error:
        run.planned_pairs(("onnx-int8",), ("cuda",))
    assert "--allow-fallback" in error.value.hint
    assert run.planned_pairs(("onnx-int8",), ("cuda",), allow_fallback=True) == [("onnx-int8", "cuda")]
    assert run.planned_pairs(("onnx-int8",), (), allow_fallback=True) == [("onnx-int8", "cpu")]
    with pytest.raises(BenchError, match="torch-int8 does not run on cuda"):
        run.planned_pairs(("torch-int8",), ("cuda",), allow_fallback=True)


def test_a_wrong_device_id_gives_an_error_that_lists_the_gpus(monkeypatch, tmp_path, tiny_checkpoint, capsys):
    monkeypatch.setattr(hardware, "gpus", lambda: ([T4], "580.1"))
    assert hardware.missing_cuda(0) is None
    assert hardware.missing_cuda(2) == (
        "There is no GPU 2 on this machine.",
        "Pass the index of one of these GPUs as --device-id: 0 Tesla T4.",
    )
    arguments = ["bench", "--model", str(tiny_checkpoint), "--exported", str(tmp_path), "--provider", "cuda"]
    assert main([*arguments, "--device-id", "2", "--dry-run"]) == 0
    assert "unavailable: There is no GPU 2" in capsys.readouterr().out
    assert main([*arguments, "--device-id", "-1"]) == 2


def test_onnx_fp16_is_fused_for_cuda_in_half_precision(tiny):
    artifact = ensure(tiny, ["onnx-fp16"], {}, lambda line: None)["onnx-fp16"]
    facts = artifact.manifest.facts
    assert {"Attention", "SkipLayerNormalization", "EmbedLayerNormalization"} <= set(facts["operators"])
    assert facts["bytes_by_dtype"]["float16"] > 20 * facts["bytes_by_dtype"].get("float32", 0)
    assert facts["rewrites"]["half"] > 0
    assert artifact.manifest.size_bytes < 0.6 * tiny.load("onnx-std").manifest.size_bytes
    logits = open_session(artifact.path, "onnx", Place("cpu", 1)).run(BATCH)
    reference_logits = open_session(tiny.path("torch-fp32"), "torch", Place("cpu", 1)).run(BATCH)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - reference_logits).max() < 0.05


def test_export_with_optimize_cuda_plans_onnx_fp16(tiny_checkpoint, tmp_path, capsys):
    arguments = ["export", "--model", str(tiny_checkpoint), "--exported", str(tmp_path), "--optimize", "cuda"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "onnx-fp16: build (missing); provider=cuda, passes=['fuse-cuda', 'half']" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_pytorch_gives_the_same_logits_on_gpu_and_cpu(built_tiny):
    on_gpu, on_cpu = (TorchSession(built_tiny.path("torch-fp32"), Place(name, 1)) for name in ("cuda", "cpu"))
    assert on_gpu.facts()["provider"] == "cuda"
    assert np.abs(on_gpu.run(BATCH) - on_cpu.run(BATCH)).max() < 1e-2  # TF32
    assert on_gpu.resident(BATCH)().device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_gpu_memory_grows_by_the_size_of_a_new_tensor():
    meter = gpu_memory.meter(0)
    memory_before = meter.read()
    tensor = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    assert meter.read() - memory_before >= tensor.numel()
