"""How much of a GPU's memory this process holds, by NVML: the same measure for every runtime."""

from __future__ import annotations

import os
from typing import Any

PROCESS, DIFFERENCE = "NVML, this process", "NVML, the device's difference since before the load"


class GpuMemory:
    """A meter of one GPU, made before anything is loaded there.

    Where a container hides processes from NVML, what the whole device holds more than when the meter was made stands in
    for the process's share, and `method` says so: other users of the GPU count then, cells measured beside it too.
    """

    def __init__(self, device_id: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._handle = _handle(device_id)
        self._before = self._device()
        self.method = DIFFERENCE
        self.peak = 0

    def read(self) -> int:
        """Bytes held now; `peak` is the largest so far. Runtimes keep what they once took, so a reading after the work
        has its peak."""
        import pynvml

        mine = [
            process.usedGpuMemory
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            if process.pid == os.getpid() and process.usedGpuMemory
        ]
        self.method = PROCESS if mine else DIFFERENCE
        held = sum(mine) if mine else max(0, self._device() - self._before)
        self.peak = max(self.peak, held)
        return held

    def _device(self) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def meter(device_id: int) -> GpuMemory | None:
    """A meter of the GPU that CUDA counts as `device_id` in bus order; None where NVML does not answer."""
    import pynvml

    try:
        return GpuMemory(device_id)
    except pynvml.NVMLError:
        return None


def allocator_peak(device_id: int) -> int | None:
    """The peak of PyTorch's own allocator there, in bytes; None where this process does not use PyTorch on a GPU."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated(device_id))


def _handle(device_id: int) -> Any:
    """NVML counts all GPUs, CUDA those that `CUDA_VISIBLE_DEVICES` leaves: by number or by name."""
    import pynvml

    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[device_id] if visible else str(device_id)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
