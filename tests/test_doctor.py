"""Tests of doctor's findings about ONNX Runtime, PyTorch and the GPU, on simulated machines."""

import importlib.metadata
import sys

import pynvml
import pytest

from toolchain import doctor, exporters
from toolchain.system import extras, hardware

T4 = {"name": "Tesla T4", "memory_bytes": 2**34, "compute_capability": "7.5"}
PASCAL = {"name": "NVIDIA GeForce GTX 1050 Ti", "memory_bytes": 2**32, "compute_capability": "6.1"}
CPU_STACK = {"torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "bitsandbytes": "0.50.2", "torchao": "0.18.0"}
GPU_STACK = {"torch": "2.13.0", "onnxruntime-gpu": "1.31.1", "bitsandbytes": "0.50.2", "torchao": "0.18.0"}


@pytest.fixture
def examine_machine(monkeypatch, tmp_path):
    """Returns a function that runs doctor on a machine with the given GPUs, driver and package versions.

    `cuda` is the CUDA version for which the packages were built.
    """

    def examine(devices, driver, versions, cuda):
        monkeypatch.setattr("toolchain.system.hardware.gpus", lambda: (devices, driver))
        monkeypatch.setattr("toolchain.system.hardware.versions", lambda: versions)
        monkeypatch.setattr("toolchain.system.hardware.built_for_cuda", lambda _: cuda)
        return doctor.examine(tmp_path)

    return examine


def notes(findings):
    """Returns the text and the hint of each note about GPUs and the packages that use them."""
    return [(f.what, f.mend) for f in findings if f.level == "note" and ("GPU" in f.what or "bits" in f.what)]


@pytest.mark.parametrize(
    ("devices", "driver", "line"),
    [
        ([], "", "pip install -c constraints/cpu.txt -e '.[cpu,bnb]'"),
        ([T4], "580.65.06", "pip install -c constraints/gpu.txt -e '.[gpu,bnb]'"),
        ([T4], "535.183.01", "pip install -c constraints/cuda12.txt -e '.[gpu,bnb]'"),
        ([PASCAL], "580.65.06", "pip install -c constraints/cuda12.txt -e '.[gpu,bnb]'"),
    ],
)
def test_two_runtimes_or_none_give_a_problem_with_the_machines_packages(examine_machine, devices, driver, line):
    both_stacks = {**CPU_STACK, **GPU_STACK}
    problem = next(f for f in examine_machine(devices, driver, both_stacks, "12.6") if f.level == "problem")
    assert "both installed" in problem.what
    assert problem.mend == f"pip uninstall -y onnxruntime onnxruntime-gpu && {line}"
    problem = next(f for f in examine_machine(devices, driver, {}, None) if f.level == "problem")
    assert problem.what == "no ONNX Runtime is installed"
    assert problem.mend == line


def test_a_source_tree_that_is_not_installed_gives_a_problem(examine_machine, monkeypatch):
    def raise_not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", raise_not_found)
    problem = next(f for f in examine_machine([], "", CPU_STACK, None) if f.level == "problem")
    assert problem.what == "toolchain runs from its source folder and is not installed"
    assert problem.mend == "pip install -c constraints/cpu.txt -e '.[cpu,bnb]'"


def test_doctor_names_a_gpu_and_its_constraints_file(examine_machine):
    parts = [f.what for f in examine_machine([T4], "580.65.06", GPU_STACK, "13.0") if f.level == "ok"]
    assert "Tesla T4, 16 GiB, compute capability 7.5, driver 580.65.06" in parts
    assert "constraints/gpu.txt is the constraints file for this driver and GPU" in parts
    parts = [f.what for f in examine_machine([T4, PASCAL], "580.65.06", GPU_STACK, "12.6") if f.level == "ok"]
    assert "constraints/cuda12.txt is the constraints file for this driver and GPU" in parts


def test_packages_that_fit_the_gpu_give_no_note(examine_machine):
    assert notes(examine_machine([T4], "580.65.06", GPU_STACK, "13.0")) == []
    # A driver also runs packages that were built for an older CUDA version.
    assert notes(examine_machine([T4], "580.65.06", GPU_STACK, "12.6")) == []
    assert notes(examine_machine([T4], "535.183.01", GPU_STACK, "12.6")) == []


@pytest.mark.parametrize(("driver", "runtime"), [("580.65.06", "gpu"), ("535.183.01", "cuda12")])
def test_cpu_packages_on_a_machine_with_a_gpu_give_notes(examine_machine, driver, runtime):
    hint = f"make install RUNTIME={runtime}"
    assert notes(examine_machine([T4], driver, CPU_STACK, None)) == [
        ("onnxruntime 1.32.0 cannot use the GPU; onnxruntime-gpu can", hint),
        ("torch 2.13.0+cpu cannot use the GPU: it was built without CUDA", hint),
    ]


def test_packages_too_new_for_the_gpu_give_notes(examine_machine):
    assert notes(examine_machine([PASCAL], "580.65.06", GPU_STACK, "13.0")) == [
        ("torch 2.13.0 cannot use the GPU: it was built for CUDA 13.0", "make install RUNTIME=cuda12"),
        ("onnxruntime-gpu 1.31.1 cannot use the GPU: it was built for CUDA 13.0", "make install RUNTIME=cuda12"),
    ]


def test_gpu_packages_on_a_machine_without_a_gpu_give_a_note(examine_machine):
    ((part, hint),) = notes(examine_machine([], "", GPU_STACK, "13.0"))
    assert "onnxruntime-gpu is installed" in part
    assert "make install RUNTIME=cpu" in hint
    ((part, hint),) = notes(examine_machine([], "", CPU_STACK, None))
    assert "@cuda are unavailable" in part
    assert hint == "No fix is necessary to work on the CPU."


def test_a_missing_bitsandbytes_gives_a_note(examine_machine):
    assert "bitsandbytes 0.50.2" in [f.what for f in examine_machine([], "", CPU_STACK, None) if f.level == "ok"]
    stack_without_it = {name: version for name, version in GPU_STACK.items() if name != "bitsandbytes"}
    assert notes(examine_machine([T4], "580.65.06", stack_without_it, "13.0")) == [
        (
            "bitsandbytes is missing, so variants bnb-* are unavailable",
            "pip install -c constraints/gpu.txt -e '.[gpu,bnb]'",
        )
    ]


@pytest.mark.parametrize(
    ("torch", "torchao", "level", "what", "hint"),
    [
        ("2.13.0+cpu", "0.18.0", "ok", "torchao 0.18.0", ""),
        ("2.13.0+cpu", None, "note", "torchao is missing", "-c constraints/cpu.txt -e '.[cpu,bnb,torchao]'`"),
        ("2.7.1", None, "note", "torchao is missing", "Use torch-int8 with PyTorch 2.7.1."),
        ("2.7.1", "0.18.0", "problem", "torchao 0.18.0 needs PyTorch 2.11", "pip uninstall -y torchao"),
    ],
)
def test_doctor_states_whether_torchao_fits_the_installed_pytorch(examine_machine, torch, torchao, level, what, hint):
    stack = {**CPU_STACK, "torch": torch, "torchao": torchao}
    versions = {name: version for name, version in stack.items() if version}
    (finding,) = (f for f in examine_machine([], "", versions, None) if f.what.startswith("torchao"))
    assert finding.level == level
    assert what in finding.what
    assert hint in finding.mend


def test_the_extra_torchao_requires_the_pytorch_that_doctor_checks():
    extra = extras.requirements_of_extra("torchao")
    assert f"torch>={doctor.TORCHAO_TORCH}" in map(str, extra)


@pytest.fixture
def nvml(monkeypatch):
    """Three simulated GPUs: one reports everything, one has unknown memory and compute capability, and one is lost."""

    def answer_unless(failing_indices, code, answer):
        def query(*arguments):
            if arguments and arguments[0] in failing_indices:
                raise pynvml.NVMLError(code)
            return answer

        return query

    lost_error = pynvml.NVML_ERROR_GPU_IS_LOST
    unsupported_error = pynvml.NVML_ERROR_NOT_SUPPORTED
    memory = type("Memory", (), {"total": 2**34})
    for name, query in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: answer_unless([2], lost_error, index)(index),
        "nvmlDeviceGetName": lambda _: b"Tesla T4",
        "nvmlDeviceGetMemoryInfo": answer_unless([1], unsupported_error, memory),
        "nvmlDeviceGetCudaComputeCapability": answer_unless([1], unsupported_error, (7, 5)),
        "nvmlSystemGetDriverVersion": lambda: b"580.65.06",
    }.items():
        monkeypatch.setattr(pynvml, name, query)


@pytest.mark.usefixtures("nvml")
def test_doctor_accepts_a_gpu_with_unknown_figures(monkeypatch, tmp_path):
    assert hardware.gpus() == ([T4, {**T4, "memory_bytes": 0, "compute_capability": ""}], "580.65.06")
    parts = [f.what for f in doctor.examine(tmp_path)]
    assert "Tesla T4, unknown memory, compute capability unknown, driver 580.65.06" in parts
    assert any(part.endswith("cuda12.txt is the constraints file for this driver and GPU") for part in parts)

    def raise_unknown_error(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    for name in ("nvmlDeviceGetName", "nvmlSystemGetDriverVersion", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, raise_unknown_error)
    assert hardware.gpus()[0][0]["name"] == "NVIDIA GPU"
    assert "NVIDIA GPU, 16 GiB, compute capability 7.5, driver unknown" in [f.what for f in doctor.examine(tmp_path)]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", raise_unknown_error)
    assert hardware.gpus() == ([], "")


@pytest.mark.parametrize(
    ("package", "file", "text", "cuda"),
    [
        ("torch", "version.py", "from typing import Optional\ncuda: Optional[str] = '12.6'\n", "12.6"),
        ("torch", "version.py", "cuda = None\n", None),
        ("onnxruntime", "capi/build_and_package_info.py", "cuda_version = '13.0'\n", "13.0"),
        ("onnxruntime", "capi/build_and_package_info.py", "package_name = 'onnxruntime'\n", None),
        ("onnxruntime", "capi/other.py", "", None),
    ],
)
def test_built_for_cuda_reads_a_package_without_importing_it(monkeypatch, tmp_path, package, file, text, cuda):
    path = tmp_path / package / file
    path.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
    path.write_text(text)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    assert hardware.built_for_cuda(package) == cuda


def test_built_for_cuda_is_none_for_a_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert hardware.built_for_cuda("torch") is None


@pytest.mark.parametrize(
    ("machine", "isa", "is_exact"),
    [
        ("x86_64", ["avx2", "avx512f"], False),
        ("x86_64", ["avx2", "avx_vnni"], True),
        ("x86_64", ["avx512f", "avx512_vnni"], True),
        ("aarch64", ["asimd"], True),
    ],
)
def test_a_saturating_processor_gives_a_note_with_a_hint(monkeypatch, machine, isa, is_exact):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("toolchain.system.hardware.processor", lambda: {"cpu": "a processor", "isa": isa})
    assert hardware.exact_int8() is is_exact
    finding = doctor._processor()[0]
    assert finding.level == ("ok" if is_exact else "note")
    assert is_exact or "session.x64quantprecision = 1" in finding.what
    assert is_exact or "toolchain quantize --isa portable" in finding.mend


def test_an_exporter_that_does_not_fit_is_a_problem(examine_machine, monkeypatch):
    versions = {**CPU_STACK, "optimum-onnx": "0.1.0"}
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": ("no-such-package",), "torch": ()})
    problem = next(f for f in examine_machine([], "", versions, None) if f.level == "problem")
    assert problem.what == "no-such-package is not installed, so the exporter optimum is unavailable"
    assert "make install SET=optimum" in problem.mend
    findings = [f.what for f in examine_machine([], "", CPU_STACK, None)]
    assert "the default exporter is torch, the exporter of the package set `current`" in findings


def test_a_command_to_reinstall_keeps_the_installed_set(examine_machine):
    findings = examine_machine([T4], "580.65.06", {"optimum-onnx": "0.1.0"}, None)
    problem = next(f for f in findings if f.what == "no ONNX Runtime is installed")
    assert problem.mend == "pip install -c constraints/optimum-gpu.txt -e '.[gpu,bnb,optimum]'"
