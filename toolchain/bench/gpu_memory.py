"""Measures the GPU memory of this process with NVML: the same method for all runtimes."""

from __future__ import annotations

import os
from typing import Any

PROCESS, DIFFERENCE = "NVML, this process", "NVML, growth of the device's used memory since a reading before the load"


class GpuMemory:
    """A meter of this process's memory on one GPU.

    Create the meter before the process loads anything on the GPU. In a container that hides processes from NVML, the
    meter reports the growth of the GPU's used memory since the creation of the meter. The growth of used
    memory includes the memory of other processes on the GPU, such as the processes of other cells.

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
        """Returns this process's GPU memory in bytes and updates `peak`.

        Runtimes keep all memory that they allocate, so a reading after a batch includes the peak during the batch.
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
    """Returns a memory meter for a GPU, or None if NVML does not work.

    Args:
        device_id: CUDA's index of the GPU, in the order of the PCI bus.
    """
    import pynvml

    try:
        return GpuMemory(device_id)
    except pynvml.NVMLError:
        return None


def allocator_peak(device_id: int) -> int | None:
    """Returns the peak of PyTorch's allocator in bytes, or None if this process does not use PyTorch on a GPU.

    Args:
        device_id: CUDA's index of the GPU.
    """
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated(device_id))


def _handle(device_id: int) -> Any:
    """Returns NVML's handle of the GPU with this CUDA index.

    NVML's indices count all GPUs. CUDA's indices count only the GPUs in `CUDA_VISIBLE_DEVICES`, a list of NVML indices
    or UUIDs.
    """
    import pynvml

    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[device_id] if visible else str(device_id)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
