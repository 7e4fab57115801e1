"""Numeric precision and attention kernel of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolchain.system import hardware

if TYPE_CHECKING:
    import torch


def precision(device: torch.device) -> torch.dtype:
    """Returns the precision in which `device` trains fastest.

    The precision is bfloat16 if the hardware supports it, else float16 on GPUs with fast float16, else float32.
    Emulated half precision is slower than float32.
    """
    import torch

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    has_bf16 = bool({"avx512_bf16", "amx_bf16"} & set(hardware.processor()["isa"]))
    return torch.bfloat16 if has_bf16 else torch.float32


@contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """Replaces fused attention with PyTorch's math kernel on a CPU; changes nothing on other devices.

    On a CPU, fused attention takes half of the time of a training step. PyTorch's math kernel has a faster backward
    pass than fused attention. The backward pass of PyTorch's math kernel becomes faster if intermediate results stay in
    the precision of the inputs.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cpu":
        yield
        return
    settings = torch.backends.cuda  # settings of PyTorch's math attention kernel, on CPUs too
    old_setting = settings.fp16_bf16_reduction_math_sdp_allowed()
    settings.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        settings.allow_fp16_bf16_reduction_math_sdp(old_setting)
