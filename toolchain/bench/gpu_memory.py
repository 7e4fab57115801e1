"""GPU memory of this process, measured with NVML, so that all runtimes use the same method."""

from __future__ import annotations

import os
from typing import Any

PROCESS, DIFFERENCE = "NVML, this process", "NVML, the device's difference since before the load"


class GpuMemory:
    """A meter of this process's memory on one GPU; create it before the process loads anything there.

    A container may hide processes from NVML. The meter then reports the increase of the device's used memory since its
    creation. This increase includes other users of the GPU, such as other cells.

    Attributes:
        method: The method of the last reading, `PROCESS` or `DIFFERENCE`.
        peak: The largest reading so far, in bytes.
    """

    def __init__(self, device_id: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._handle = _handle(device_id)
        self._used_at_start = self._read_used()
        self.method = DIFFERENCE
        self.peak = 0

    def read(self) -> int:
        """Returns the used bytes and updates `peak`.

        Runtimes keep the memory that they once allocated, so a reading after the work includes its peak.
        """
        import pynvml

        process_bytes = [
            process.usedGpuMemory
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            if process.pid == os.getpid() and process.usedGpuMemory
        ]
        self.method = PROCESS if process_bytes else DIFFERENCE
        used_bytes = sum(process_bytes) if process_bytes else max(0, self._read_used() - self._used_at_start)
        self.peak = max(self.peak, used_bytes)
        return used_bytes

    def _read_used(self) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def meter(device_id: int) -> GpuMemory | None:
    """Returns a meter of a GPU, or None if NVML does not work.

    Args:
        device_id: Number of the GPU for CUDA, in the order of the PCI bus.
    """
    import pynvml

    try:
        return GpuMemory(device_id)
    except pynvml.NVMLError:
        return None


def allocator_peak(device_id: int) -> int | None:
    """Returns the peak of PyTorch's allocator in bytes, or None if this process does not use PyTorch on a GPU.

    Args:
        device_id: Number of the GPU for CUDA.
    """
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated(device_id))


def _handle(device_id: int) -> Any:
    """Returns NVML's handle of a GPU, given its number for CUDA.

    NVML numbers all GPUs. CUDA numbers only the GPUs in `CUDA_VISIBLE_DEVICES`, which lists numbers or UUIDs.
    """
    import pynvml

    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[device_id] if visible else str(device_id)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
