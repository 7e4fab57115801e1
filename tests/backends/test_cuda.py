"""CUDA without a device, up to the first call of the GPU: provider, GPU number, fallbacks, memory."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pynvml
import pytest
import torch

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
from toolchain.compare.report.columns import columns, notes
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


class OnTheHost:
    """A real CPU session that says it is on CUDA: what is bound to the GPU is bound to the host."""

    # Set by the fixture, for one test each: operators that are on the CPU, devices bound to, what was asked for.
    elsewhere: tuple
    devices: list
    options: list

    def __init__(self, path, options, providers):
        self._real = REAL_SESSION(path, options, providers=["CPUExecutionProvider"])
        self.options.append(providers)

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        def part(provider, kinds):
            return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=k) for k in kinds])

        there = [node.op_type for p in self._real.get_provider_graph_assignment_info() for node in p.get_nodes()]
        return [part("CUDAExecutionProvider", there), part("CPUExecutionProvider", [*self.elsewhere, "Shape", "Slice"])]

    def io_binding(self):
        binding, devices = self._real.io_binding(), self.devices

        def bind_output(name, kind, device_id):
            devices.append((kind, device_id))
            binding.bind_output(name, "cpu")

        return SimpleNamespace(
            bind_ortvalue_input=binding.bind_ortvalue_input,
            bind_output=bind_output,
            copy_outputs_to_cpu=binding.copy_outputs_to_cpu,
            synchronize_outputs=binding.synchronize_outputs,
            real=binding,
        )

    def run_with_iobinding(self, binding):
        self._real.run_with_iobinding(binding.real)

    def get_outputs(self):
        return self._real.get_outputs()


REAL_SESSION, REAL_VALUE = ort.InferenceSession, ort.OrtValue


@pytest.fixture
def cuda(monkeypatch):
    """ONNX Runtime with a GPU, as far as its caller can tell."""
    fake = type("OnTheHost", (OnTheHost,), {"elsewhere": (), "devices": [], "options": []})

    def from_numpy(array, kind, device_id):
        fake.devices.append((kind, device_id))
        return REAL_VALUE.ortvalue_from_numpy(array, "cpu", 0)

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", fake)
    monkeypatch.setattr(ort, "OrtValue", SimpleNamespace(ortvalue_from_numpy=from_numpy))
    monkeypatch.setattr(ort, "preload_dlls", lambda: fake.options.append("preloaded"), raising=False)
    return fake


def test_onnx_on_a_gpu_is_bound_to_it_and_answers_as_on_the_cpu(built_tiny, cuda, monkeypatch):
    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1, device_id=1))
    logits = session.run(BATCH)
    assert set(cuda.devices) == {("cuda", 1)}
    assert len(cuda.devices) == 3  # two inputs, one output
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


def test_a_node_without_a_kernel_on_the_gpu_is_refused_by_name_and_allowed_as_what_it_is(built_tiny, cuda):
    cuda.elsewhere = ("DynamicQuantizeMatMul", "DynamicQuantizeMatMul", "Gelu")
    with pytest.raises(ProviderError, match="no kernel for 2 DynamicQuantizeMatMul, 1 Gelu"):
        OrtSession(built_tiny.path("onnx-int8"), Place("cuda", 1))
    session = OrtSession(built_tiny.path("onnx-int8"), Place("cuda", 1, allow_fallback=True))
    assert session.facts()["fallback"].startswith("3 of ")
    assert session.facts()["fallback"].endswith("nodes run on the CPU")


def test_a_whole_session_that_fell_back_says_so_where_that_is_allowed(built_tiny, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: REAL_SESSION(path, options, ["CPUExecutionProvider"])
    )
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1))
    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1, allow_fallback=True))
    assert session.facts()["fallback"] == "runs on CPUExecutionProvider, not on CUDAExecutionProvider"
    assert session.run(BATCH).shape == (2, 2)
    session.resident(BATCH)()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Failed to allocate memory for requested buffer of size 2147483648", "memory for the requested 2,048 MiB"),
        (
            "Available memory of 1048576 is smaller than requested bytes of 2147483648",
            "memory for the requested 2,048 MiB",
        ),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);", "memory"),
    ],
)
def test_onnx_runtimes_want_of_room_names_the_number_it_gives(built_tiny, cuda, said, named):
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    session = OrtSession(built_tiny.path("onnx-fp32"), Place("cuda", 1))

    def fails(binding):
        raise RuntimeException(said)

    session._session.run_with_iobinding = fails
    with pytest.raises(DeviceMemoryError, match=f"too little {named}"):
        session.run(BATCH)


def test_pytorchs_want_of_room_names_the_number():
    with (
        pytest.raises(DeviceMemoryError, match="too little memory for the requested 20 MiB"),
        translate_memory_error(torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …")


def test_a_pytorch_session_leaves_the_batch_where_the_model_is(built_tiny):
    session = TorchSession(built_tiny.path("torch-fp32"), Place("cpu", 1))
    answer = session.resident(BATCH)
    np.testing.assert_array_equal(answer().numpy(), session.run(BATCH))


@pytest.mark.parametrize(
    ("capability", "built_for", "served"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90", "compute_120"], False),  # GTX 1050 Ti, CUDA 13
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),
        ((7, 5), ["sm_70", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90a", "compute_90"], True),  # compiled for it when loaded
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((8, 9), [], True),  # a build that does not say
    ],
)
def test_a_gpu_that_the_build_has_no_kernels_for_is_known_beforehand(monkeypatch, capability, built_for, served):
    assert _has_kernels(capability, built_for) is served
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if served:
        assert device(Place("cuda", 1, device_id=1)) == torch.device("cuda:1")
    else:
        with pytest.raises(ProviderError, match=r"has no kernels for a GPU, compute capability \d+\.\d"):
            device(Place("cuda", 1))


@pytest.fixture
def nvml(monkeypatch):
    """NVML with one GPU whose figures a test sets."""
    state = SimpleNamespace(used=1000, processes=[], asked=[])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: state.asked.append(index) or "gpu")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: state.asked.append(name) or "gpu")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=state.used))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: state.processes)
    return state


def test_gpu_memory_is_this_processs_share(nvml, monkeypatch):
    monkeypatch.setattr(gpu_memory.os, "getpid", lambda: 7)
    meter = gpu_memory.meter(0)
    nvml.processes = [SimpleNamespace(pid=7, usedGpuMemory=300), SimpleNamespace(pid=8, usedGpuMemory=5000)]
    assert (meter.read(), meter.method) == (300, gpu_memory.PROCESS)
    nvml.processes[0].usedGpuMemory = 200
    assert (meter.read(), meter.peak) == (200, 300)


@pytest.mark.parametrize("hidden", [[], [SimpleNamespace(pid=-1, usedGpuMemory=9)], None])
def test_where_a_container_hides_processes_it_is_the_devices_difference_and_marked(nvml, hidden):
    import os

    meter = gpu_memory.meter(0)
    # Some drivers list the process and keep its share to themselves.
    nvml.processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)] if hidden is None else hidden
    nvml.used = 1750
    assert (meter.read(), meter.method) == (750, gpu_memory.DIFFERENCE)


def test_without_nvml_there_is_no_figure(monkeypatch):
    def missing():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert gpu_memory.meter(0) is None
    assert hardware.gpus() == ([], "")


@pytest.mark.parametrize(("visible", "asked"), [("", 1), ("3,5", 5), ("GPU-aa,GPU-bb", "GPU-bb")])
def test_nvml_is_asked_for_the_gpu_that_cuda_means(nvml, monkeypatch, visible, asked):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu_memory.meter(1)
    assert nvml.asked == [asked]


@pytest.fixture
def measured(fake, monkeypatch):
    """Rows of fake cells on CUDA: name → behaviour."""
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)
    encoder = Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)
    data = Data("fake", tuple(f"sentence number {i}" for i in range(40)), tuple(i % 2 for i in range(40)))
    protocol = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8, device_id=1)

    def measure(**behaviours):
        cells = [Cell("fake", n, "fake", "cuda", fake(n, **does)) for n, does in behaviours.items()]
        rows, how = bench(cells, data, encoder, protocol, lambda *_: None, FAKE)
        return run.make_result(rows, how, data, 512)

    return measure


def test_a_cuda_row_has_the_time_on_the_device_beside_the_whole(measured, tmp_path):
    run = measured(quick={"us": 900, "resident_us": 400})
    row = run.rows[0]
    assert 0.4 <= row.resident_ms["p50"] < row.latency_ms["p50"]
    assert row.resident.count == 40  # every sentence once
    assert row.facts["session"]["device_id"] == 1
    assert row.facts["session"]["device_order"] == "PCI_BUS_ID"
    assert run.run["device_id"] == 1
    run.write(tmp_path / "run.json")
    assert ResultFile.read(tmp_path / "run.json") == run
    shown = compare([run])
    assert "on device p50 ms" in [header for header, _ in columns(shown)]
    assert any(line.startswith("On device:") for line in notes(shown))


def test_a_gpu_without_room_fails_its_row_with_the_number_and_no_other(measured):
    rows = {row.variant: row for row in measured(good={}, big={"ask_for": 3 << 30, "after": 20}).rows}
    assert rows["good"].status == "ok"
    assert (rows["big"].status, "3,072 MiB" in rows["big"].reason) == ("failed", True)


def test_a_fallback_is_marked_wherever_the_row_is_shown(measured):
    run = measured(half={})
    facts = {**run.rows[0].facts, "session": {"fallback": "3 of 9 nodes run on the CPU", "note": "memory, not speed"}}
    run = dataclasses.replace(run, rows=(dataclasses.replace(run.rows[0], facts=facts),))
    shown = compare([run])
    # Whether it is noisy as well is this machine's doing.
    assert dict(columns(shown))["cell"](shown[0]).removesuffix(" [noisy]") == "half@cuda ◆ [fallback]"
    assert {"half@cuda: 3 of 9 nodes run on the CPU.", "half@cuda: memory, not speed."} <= set(notes(shown))


def test_gpu_memory_has_its_column_and_its_method(measured):
    run = measured(one={})
    memory = {**run.rows[0].memory_bytes, "gpu": {"load": 1, "peak": 300_000_000, "method": gpu_memory.DIFFERENCE}}
    run = dataclasses.replace(run, rows=(dataclasses.replace(run.rows[0], memory_bytes=memory),))
    shown = compare([run])
    assert dict(columns(shown))["GPU peak MB"](shown[0]) == "300"
    assert f"GPU peak: {gpu_memory.DIFFERENCE}." in notes(shown)


def test_cells_that_fall_back_are_planned_only_where_that_is_allowed():
    with pytest.raises(BenchError, match="onnx-int8 is not measured on cuda") as error:
        run.planned_pairs(("onnx-int8",), ("cuda",))
    assert "--allow-fallback" in error.value.hint
    assert run.planned_pairs(("onnx-int8",), ("cuda",), allow_fallback=True) == [("onnx-int8", "cuda")]
    assert run.planned_pairs(("onnx-int8",), (), allow_fallback=True) == [("onnx-int8", "cpu")]
    with pytest.raises(BenchError, match="torch-int8 is not measured on cuda"):
        run.planned_pairs(("torch-int8",), ("cuda",), allow_fallback=True)


def test_a_wrong_device_id_is_told_with_what_there_is(monkeypatch, tmp_path, tiny_checkpoint, capsys):
    monkeypatch.setattr(hardware, "gpus", lambda: ([T4], "580.1"))
    assert hardware.missing_cuda(0) is None
    assert hardware.missing_cuda(2) == (
        "There is no GPU 2 on this machine.",
        "Pass one of these as --device-id: 0 Tesla T4.",
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
    wanted = open_session(tiny.path("torch-fp32"), "torch", Place("cpu", 1)).run(BATCH)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - wanted).max() < 0.05


def test_export_for_cuda_builds_it(tiny_checkpoint, tmp_path, capsys):
    arguments = ["export", "--model", str(tiny_checkpoint), "--exported", str(tmp_path), "--optimize", "cuda"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "onnx-fp16: build (missing); provider=cuda, passes=['fuse-cuda', 'half']" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_pytorch_on_the_gpu_answers_as_on_the_cpu(built_tiny):
    there, here = (TorchSession(built_tiny.path("torch-fp32"), Place(name, 1)) for name in ("cuda", "cpu"))
    assert there.facts()["provider"] == "cuda"
    assert np.abs(there.run(BATCH) - here.run(BATCH)).max() < 1e-2  # TF32
    assert there.resident(BATCH)().device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_gpu_memory_grows_with_what_is_put_there():
    meter = gpu_memory.meter(0)
    before = meter.read()
    held = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    assert meter.read() - before >= held.numel()
