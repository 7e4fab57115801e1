"""Facts about this machine: processor, instruction sets, cores, memory, GPUs, and versions of installed packages."""

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
from typing import Annotated, Any, NotRequired, cast

from typing_extensions import TypedDict

from toolchain.system.decoding import Count, Line, Plain, open_record
from toolchain.system.quota import cpu_quota

# The packages whose versions affect measurements.
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
    "torchao",
    "peft",
    "datasets",
    "numpy",
)
# The processor flags that determine which int8 and bf16 kernels run.
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
# CUDA 13 needs at least this driver version and this compute capability; the Makefile contains the same values.
CUDA_13_DRIVER = (580,)
CUDA_13_CAPABILITY = (7, 5)
# Maps a package to the file that states its CUDA version, and to the variable that holds this version.
# `built_for_cuda` finds the CUDA version of a package without importing the package.
BUILDS = {"torch": ("version.py", "cuda"), "onnxruntime": ("capi/build_and_package_info.py", "cuda_version")}


@open_record
class Gpu(TypedDict):
    """A GPU: its name, its memory in bytes (0 if unknown) and its compute capability (empty if unknown)."""

    name: Line
    memory_bytes: NotRequired[Count]
    compute_capability: NotRequired[Line]


@open_record
class Machine(TypedDict):
    """The description of a machine in a result file; an unknown number is 0, and an unknown text is empty."""

    id: Line
    cpu: Line
    cores: Count
    ram_gib: Count
    isa: list[Line]
    gpu: list[Gpu]
    system: NotRequired[Line]
    driver: NotRequired[Line]
    versions: NotRequired[dict[Line, Line]]


StoredMachine = Annotated[Machine, Plain]


def versions() -> dict[str, str]:
    """Returns the version of Python and of each installed package in `STACK`."""
    installed = {"python": platform.python_version()}
    for name in STACK:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def cores() -> int:
    """Returns the number of physical cores that this process may use.

    In a container with a CPU quota, it is the quota without its fraction, but at least 1. More threads than the quota
    would use up the quota early, and would then wait.
    """
    import psutil

    physical_count = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical_count
    quota = cpu_quota()
    return max(1, min(physical_count, allowed_count, physical_count if quota is None else int(quota)))


@functools.cache
def processor() -> dict[str, Any]:
    """Returns a dict with the processor's name as ``cpu``, and its flags among `ISA_FLAGS` as ``isa``."""
    name, flags = _linux_processor()
    if not name or not flags:
        import cpuinfo

        info = cpuinfo.get_cpu_info()  # takes about a second
        name, flags = info.get("brand_raw", ""), info.get("flags", [])
    return {
        "cpu": name or platform.processor() or "unknown",
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def _linux_processor() -> tuple[str, list[str]]:
    """Returns the name and the flags of an x86 processor on Linux; empty on other processors and systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", []
    # Each processor of the machine has the same lines; the last one wins.
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", ""), facts.get("flags", "").split()


def exact_int8() -> bool:
    """Returns whether this processor adds 8-bit products without saturation, as ARM and x86 with VNNI or AMX do."""
    return platform.machine().lower() in ("aarch64", "arm64") or any(
        flag in processor()["isa"] for flag in ("avx_vnni", "avx512_vnni", "amx_int8")
    )


def gpus() -> tuple[list[dict[str, Any]], str]:
    """Returns the NVIDIA GPUs and the driver's version, as NVML reports them.

    Returns:
        A dict of name, memory in bytes and compute capability for each GPU, and the driver's version. The list of GPUs
        and the driver's version are empty if no driver responds. The memory of a GPU is 0 if it is unknown, and its
        compute capability is empty if it is unknown.
    """
    import pynvml

    def ask(query: Callable[..., Any], *arguments: Any, default: Any = None) -> Any:
        try:
            answer = query(*arguments)
        except pynvml.NVMLError:
            return default
        return answer.decode() if isinstance(answer, bytes) else answer

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], ""
    devices = []
    for index in range(ask(pynvml.nvmlDeviceGetCount, default=0)):
        handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:  # The GPU does not respond, or belongs to another user.
            continue
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle, default=())
        devices.append(
            {
                "name": ask(pynvml.nvmlDeviceGetName, handle, default="NVIDIA GPU"),
                "memory_bytes": int(memory.total) if memory else 0,
                "compute_capability": ".".join(map(str, capability)),
            }
        )
    driver = ask(pynvml.nvmlSystemGetDriverVersion, default="")
    ask(pynvml.nvmlShutdown)
    return devices, driver


def runtime_set(devices: Sequence[dict[str, Any]], driver: str) -> str:
    """Returns the package set for `make install RUNTIME=`, which is ``cpu``, ``gpu`` or ``cuda12``.

    Args:
        devices: The GPUs, as `gpus` returns them.
        driver: Version of the NVIDIA driver. An unknown driver version or compute capability counts as too old for
            CUDA 13.
    """

    def release(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", text)))

    if not devices:
        return "cpu"
    capabilities = [release(gpu["compute_capability"]) for gpu in devices]
    return "gpu" if release(driver) >= CUDA_13_DRIVER and min(capabilities) >= CUDA_13_CAPABILITY else "cuda12"


def built_for_cuda(package: str) -> str | None:
    """Returns the CUDA version that an installed package was built for.

    Args:
        package: Name of the package, ``torch`` or ``onnxruntime``.

    Returns:
        The CUDA version, or None if the package is a CPU build, is missing, or does not state a version.
    """
    file, name = BUILDS[package]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    cuda: str | None = runpy.run_path(str(path)).get(name) if path.is_file() else None
    return cuda


def machine() -> Machine:
    """Returns the description of this machine for a result file; equal hardware has an equal ``id``."""
    import psutil

    devices, driver = gpus()
    ram = psutil.virtual_memory().total
    description = {
        **processor(),
        "cores": cores(),
        "ram_gib": round(ram / 2**30),
        "gpu": devices,
        "system": f"{platform.system()} {platform.machine()}",
    }
    digest = hashlib.sha256(repr(sorted(description.items())).encode()).hexdigest()[:12]
    return cast(Machine, {"id": digest, **description, "driver": driver, "versions": versions()})


def missing_cuda(device_id: int = 0) -> tuple[str, str] | None:
    """Returns the reason why the GPU is unavailable and an instruction to fix it, or None if it is available.

    Args:
        device_id: Index of the GPU.
    """
    devices, _ = gpus()
    if not devices:
        return (
            "No NVIDIA GPU was found on this machine.",
            "Run the same command on a machine with a GPU and its driver. `toolchain doctor` lists the GPUs.",
        )
    if device_id >= len(devices):
        device_list = ", ".join(f"{index} {gpu['name']}" for index, gpu in enumerate(devices))
        return (
            f"There is no GPU {device_id} on this machine.",
            f"Pass the index of one of these GPUs as --device-id: {device_list}.",
        )
    return None
