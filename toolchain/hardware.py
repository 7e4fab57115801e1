"""What this machine is: processor, instruction sets, cores, memory, GPUs, and the versions that run on it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
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


def gpus() -> tuple[list[dict[str, Any]], str]:
    """The NVIDIA GPUs by NVML, and the driver's version; empty where no driver answers."""
    import pynvml

    def text(value: str | bytes) -> str:
        return value.decode() if isinstance(value, bytes) else value

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], ""
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            name = text(pynvml.nvmlDeviceGetName(handle))
            found.append({"name": name, "memory_bytes": int(memory), "compute_capability": f"{major}.{minor}"})
        return found, text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


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
