"""The checks of `toolchain doctor`: each check reports on one part of this machine and how to fix its problems."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from toolchain import exporters
from toolchain.backends.ort import EXACT_PRODUCTS
from toolchain.system import hardware
from toolchain.system.extras import requirements_of
from toolchain.system.quota import cpu_quota

MIN_DISK_BYTES = 5e9
MIN_MEMORY_BYTES = 4e9
# Maps each value of RUNTIME in `make install RUNTIME=gpu` to the pip extras that the command installs. With
# `SET=current`, the command installs transformers 5; with `SET=optimum`, optimum-onnx and transformers 4.57.
RUNTIME_EXTRAS = {"cpu": "cpu,bnb", "gpu": "gpu,bnb", "cuda12": "gpu,bnb"}
# The oldest PyTorch that torchao supports, as in the extra `torchao`. If torchao is installed, transformers imports it.
TORCHAO_TORCH = Version("2.11")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ``ok``, ``note`` (the part works with a limitation) or ``problem`` (the part does not work).
        what: A description of the checked part.
        mend: A command or an instruction that fixes the problem; empty if there is nothing to fix.
    """

    level: str
    what: str
    mend: str = ""


def examine(exported: Path) -> list[Finding]:
    """Runs all checks and returns their findings in order.

    Args:
        exported: A folder on the file system that must have enough free space; the folder itself need not exist.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _requirements,
        _exporter,
        _onnxruntimes,
        _bitsandbytes,
        _torchao,
        _processor,
        _memory,
        lambda: _disk(exported),
        _gpu,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    location = sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix} (no virtual environment)"
    return [Finding("ok", f"Python {platform.python_version()} in {location}")]


def _requirements() -> list[Finding]:
    findings = []
    try:
        for requirement, version in requirements_of("toolchain"):
            if version is None:
                findings.append(Finding("problem", f"{requirement.name} is missing", f"pip install '{requirement}'"))
            elif requirement.specifier.contains(version, prereleases=True):
                findings.append(Finding("ok", f"{requirement.name} {version}"))
            else:
                what = f"{requirement.name} {version} does not satisfy {requirement.specifier}"
                findings.append(Finding("problem", what, f"pip install '{requirement}'"))
    except importlib.metadata.PackageNotFoundError:
        return [Finding("problem", "toolchain runs from its source folder and is not installed", _reinstall_command())]
    return findings


def constraints_file(runtime: str, with_optimum: bool) -> str:
    """Returns the path of the file with the pinned package versions for `runtime`, with or without optimum-onnx."""
    return f"constraints/{'optimum-' if with_optimum else ''}{runtime}.txt"


def _reinstall_command(*more_extras: str) -> str:
    runtime = hardware.runtime_set(*hardware.gpus())
    with_optimum = "optimum-onnx" in hardware.versions()
    extras = ",".join([RUNTIME_EXTRAS[runtime], *(["optimum"] if with_optimum else []), *more_extras])
    return f"pip install -c {constraints_file(runtime, with_optimum)} -e '.[{extras}]'"


def _exporter() -> list[Finding]:
    cause = exporters.unmet_requirement("optimum")
    if cause and "optimum-onnx" in hardware.versions():
        hint = "Run `make install SET=optimum`, or `pip uninstall -y optimum optimum-onnx` to use the exporter torch."
        return [Finding("problem", f"{cause}, so the exporter optimum is unavailable", hint)]
    exporter, package_set = ("torch", "current") if cause else ("optimum", "optimum")
    return [Finding("ok", f"the default exporter is {exporter}, the exporter of the package set `{package_set}`")]


def _onnxruntimes() -> list[Finding]:
    installed = {name: v for name, v in hardware.versions().items() if name in ("onnxruntime", "onnxruntime-gpu")}
    if len(installed) == 2:
        return [
            Finding(
                "problem",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && {_reinstall_command()}",
            )
        ]
    if not installed:
        return [Finding("problem", "no ONNX Runtime is installed", _reinstall_command())]
    return [Finding("ok", f"{name} {version}") for name, version in installed.items()]


def _bitsandbytes() -> list[Finding]:
    version = hardware.versions().get("bitsandbytes")
    if version is None:
        return [Finding("note", "bitsandbytes is missing, so variants bnb-* are unavailable", _reinstall_command())]
    return [Finding("ok", f"bitsandbytes {version}")]


def _torchao() -> list[Finding]:
    versions = hardware.versions()
    version, torch = versions.get("torchao"), Version(versions.get("torch", "0"))
    if version is None and torch < TORCHAO_TORCH:
        hint = f"torchao needs PyTorch {TORCHAO_TORCH} or newer. Use torch-int8 with PyTorch {torch}."
        return [Finding("note", "torchao is missing, so variants torchao-* are unavailable", hint)]
    if version is None:
        hint = f"Run `{_reinstall_command('torchao')}`, or use torch-int8."
        return [Finding("note", "torchao is missing, so variants torchao-* are unavailable", hint)]
    if torch < TORCHAO_TORCH:
        what = f"torchao {version} needs PyTorch {TORCHAO_TORCH} or newer, but PyTorch {torch} is installed"
        return [Finding("problem", what, "pip uninstall -y torchao")]
    return [Finding("ok", f"torchao {version}")]


def _processor() -> list[Finding]:
    processor = hardware.processor()
    isa = processor["isa"]
    text = f"{processor['cpu']}, {hardware.cores()} cores, {', '.join(isa) or 'no known vector extension'}"
    if platform.machine().lower() in ("x86_64", "amd64") and not hardware.exact_int8():
        option = " = ".join(EXACT_PRODUCTS)
        what = (
            f"{text}: without VNNI, int8 is slower, and in your own apps int8 is exact only with the session option "
            f"{option}"
        )
        hint = f"Set {EXACT_PRODUCTS[0]} in your own apps, or run `toolchain quantize --isa portable`."
        return [Finding("note", what, hint), *_quota()]
    return [Finding("ok", text), *_quota()]


def _quota() -> list[Finding]:
    quota = cpu_quota()
    if quota is None or quota >= 1:
        return []
    what = f"this container may use only {quota:.2g} of one core, so every measured time is longer than on a whole core"
    return [Finding("note", what, "Give the container at least one CPU, for example with `docker run --cpus 1`.")]


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    if memory.available < MIN_MEMORY_BYTES:
        return [Finding("note", text, "Close other programs, or measure fewer variants at once with --variant.")]
    return [Finding("ok", text)]


def _disk(exported: Path) -> list[Finding]:
    folder = exported.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free on the disk of {exported}"
    if free < MIN_DISK_BYTES:
        return [Finding("note", text, "Run `make clean`, or choose another disk with --exported DIR.")]
    return [Finding("ok", text)]


def _gpu() -> list[Finding]:
    devices, driver = hardware.gpus()
    runtime = hardware.runtime_set(devices, driver)
    if runtime == "cpu":
        no_gpu = "no NVIDIA GPU was found, so cells @cuda are unavailable"
        if "onnxruntime-gpu" in hardware.versions():
            hint = "Install the NVIDIA driver. On a machine without a GPU, run `make install RUNTIME=cpu`."
            return [Finding("note", f"{no_gpu}, but onnxruntime-gpu is installed", hint)]
        return [Finding("note", no_gpu, "No fix is necessary to work on the CPU.")]
    findings = []
    for gpu in devices:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu["memory_bytes"] else "unknown memory"
        capability = f"compute capability {gpu['compute_capability'] or 'unknown'}"
        findings.append(Finding("ok", f"{gpu['name']}, {memory}, {capability}, driver {driver or 'unknown'}"))
    constraints = constraints_file(runtime, "optimum-onnx" in hardware.versions())
    findings.append(Finding("ok", f"{constraints} is the constraints file for this driver and GPU"))
    return findings + [
        Finding("note", problem, f"make install RUNTIME={runtime}") for problem in _gpu_problems(runtime)
    ]


def _gpu_problems(runtime: str) -> Iterator[str]:
    """Yields a sentence for each installed package that cannot use the GPU; `runtime` is a key of `RUNTIME_EXTRAS`."""
    versions = hardware.versions()
    if "onnxruntime" in versions and "onnxruntime-gpu" not in versions:
        yield f"onnxruntime {versions['onnxruntime']} cannot use the GPU; onnxruntime-gpu can"
    for name, package in (("torch", "torch"), ("onnxruntime-gpu", "onnxruntime")):
        cuda = hardware.built_for_cuda(package) if name in versions else ""
        if cuda is None and name == "torch":
            yield f"torch {versions[name]} cannot use the GPU: it was built without CUDA"
        if cuda and runtime == "cuda12" and int(cuda.split(".")[0]) > 12:
            yield f"{name} {versions[name]} cannot use the GPU: it was built for CUDA {cuda}"
