"""What this machine is: processor, instruction sets, cores, memory, GPUs, and the versions that run on it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The distributions whose versions a figure depends on.
STACK = (
    "torch",
    "transformers",
    "tokenizers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "bitsandbytes",
    "peft",
    "datasets",
    "numpy",
)
# What decides which int8 and bf16 kernels run.
ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
)
# Below either, CUDA 13 does not run; the Makefile says the same.
CUDA_13_DRIVER = (580,)
CUDA_13_CAPABILITY = (7, 5)
# The file in which a package says what CUDA it was built for, and under which name; it can be read without the package.
BUILDS = {"torch": ("version.py", "cuda"), "onnxruntime": ("capi/build_and_package_info.py", "cuda_version")}


def versions() -> dict[str, str]:
    """The installed versions of `STACK`, and Python's."""
    found = {"python": platform.python_version()}
    for name in STACK:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Physical cores this process may use."""
    import psutil

    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


@functools.cache
def processor() -> dict[str, Any]:
    """The processor's name and those of `ISA_FLAGS` it has."""
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    have = set(info.get("flags", []))
    return {
        "cpu": info.get("brand_raw") or platform.processor() or "unknown",
        "isa": [f for f in ISA_FLAGS if f in have],
    }


def exact_int8() -> bool:
    """Whether this processor adds products of 8 bits without saturating: ARM does, x86 with VNNI or AMX."""
    return platform.machine().lower() in ("aarch64", "arm64") or any(
        flag in processor()["isa"] for flag in ("avx_vnni", "avx512_vnni", "amx_int8")
    )


def gpus() -> tuple[list[dict[str, Any]], str]:
    """The NVIDIA GPUs by NVML, and the driver's version; empty where no driver answers, and what one GPU does not tell
    is 0 or empty."""
    import pynvml

    def ask(question: Callable[..., Any], *about: Any, otherwise: Any = None) -> Any:
        try:
            answer = question(*about)
        except pynvml.NVMLError:
            return otherwise
        return answer.decode() if isinstance(answer, bytes) else answer

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], ""
    found = []
    for index in range(ask(pynvml.nvmlDeviceGetCount, otherwise=0)):
        handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:  # lost, or another user's
            continue
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle, otherwise=())
        found.append(
            {
                "name": ask(pynvml.nvmlDeviceGetName, handle, otherwise="NVIDIA GPU"),
                "memory_bytes": int(memory.total) if memory else 0,
                "compute_capability": ".".join(map(str, capability)),
            }
        )
    driver = ask(pynvml.nvmlSystemGetDriverVersion, otherwise="")
    ask(pynvml.nvmlShutdown)
    return found, driver


def runtime_set(devices: Sequence[dict[str, Any]], driver: str) -> str:
    """What `make install RUNTIME=` has to be for these GPUs and driver, cpu, gpu or cuda12; a version that was not told
    counts as old."""

    def release(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", text)))

    if not devices:
        return "cpu"
    capabilities = [release(gpu["compute_capability"]) for gpu in devices]
    return "gpu" if release(driver) >= CUDA_13_DRIVER and min(capabilities) >= CUDA_13_CAPABILITY else "cuda12"


def built_for_cuda(package: str) -> str | None:
    """The CUDA version that the installed package of `BUILDS` was built for; None for a CPU build and where it is
    missing or does not say."""
    file, name = BUILDS[package]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    cuda: str | None = runpy.run_path(str(path)).get(name) if path.is_file() else None
    return cuda


def machine() -> dict[str, Any]:
    """The machine as a result file names it; `id` is equal for equal hardware."""
    import psutil

    devices, driver = gpus()
    ram = psutil.virtual_memory().total
    hard = {
        **processor(),
        "cores": cores(),
        "ram_gib": round(ram / 2**30),
        "gpu": devices,
        "system": f"{platform.system()} {platform.machine()}",
    }
    digest = hashlib.sha256(repr(sorted(hard.items())).encode()).hexdigest()[:12]
    return {"id": digest, **hard, "driver": driver, "versions": versions()}


def missing_cuda(device_id: int = 0) -> tuple[str, str] | None:
    """Why that GPU cannot be used here, as (reason, mend); None where it answers."""
    devices, _ = gpus()
    if not devices:
        return (
            "No NVIDIA GPU answers on this machine.",
            "Run the same command on a machine with one and its driver; `toolchain doctor` shows what is found.",
        )
    if device_id >= len(devices):
        listed = ", ".join(f"{index} {gpu['name']}" for index, gpu in enumerate(devices))
        return f"There is no GPU {device_id} on this machine.", f"Pass one of these as --device-id: {listed}."
    return None
