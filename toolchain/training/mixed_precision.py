"""The arithmetic of a training step: how precise, and by which kernels of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolchain.system import hardware

if TYPE_CHECKING:
    import torch


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast, else float16 on GPUs that multiply it faster, else float32: emulated half precision is
    slower than none."""
    import torch

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    fast = bool({"avx512_bf16", "amx_bf16"} & set(hardware.processor()["isa"]))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """PyTorch's fused attention is half of a training step on a CPU; its own parts are faster backwards there, and more
    so where they stay in the precision they are given."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cpu":
        yield
        return
    settings = torch.backends.cuda  # by its name; the CPU's math kernel goes by it too
    before = settings.fp16_bf16_reduction_math_sdp_allowed()
    settings.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        settings.allow_fp16_bf16_reduction_math_sdp(before)
