"""The bitsandbytes backend, through transformers: 8-bit and 4-bit weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.pytorch import TorchSession, silence_transformers
from toolchain.errors import CheckpointError, ProviderError, first_line
from toolchain.models.checkpoints import config_of
from toolchain.models.heads import auto_class
from toolchain.system.extras import install_hint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INT8_CAPABILITY = (7, 5)  # Turing GPUs are the first with the integer tensor cores that LLM.int8() needs.
BF16_CAPABILITY = (8, 0)
BLOCK = 64  # number of weights that share a scale


def quantize_model(folder: Path, scheme: str) -> PreTrainedModel:
    """Loads the fp32 model in `folder` on the CPU and quantises the linear layers of its encoder.

    The classification head stays unquantised.

    Args:
        folder: Folder of the fp32 model.
        scheme: ``int8``, ``nf4`` or ``fp4``.

    Raises:
        ProviderError: bitsandbytes is missing, or a layer's input width is not a multiple of `BLOCK`.
        CheckpointError: bitsandbytes cannot load the model.
    """
    import torch
    from transformers import BitsAndBytesConfig

    _require_bitsandbytes()
    outline = _outline(folder)
    head_names = _head_names(outline)
    if scheme != "int8":
        _check_blocks(outline)
    if scheme == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=head_names)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=head_names,
        )
    return load(folder, torch.device("cpu"), quantization_config=config)


def load(folder: Path, device: torch.device, **options: Any) -> PreTrainedModel:
    """Loads the model in `folder` on `device`, with the compute type from `compute_dtype`.

    Args:
        folder: Folder of the model.
        device: Target device.
        **options: Further arguments of transformers' `from_pretrained`.

    Raises:
        CheckpointError: transformers or bitsandbytes cannot load the model.
    """
    silence_transformers()
    dtype = compute_dtype(device)
    try:
        model: PreTrainedModel = auto_class(config_of(folder).get("architectures")).from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    except Exception as error:  # a wrong config can make transformers raise any error
        cause = first_line(error)
        raise CheckpointError(f"bitsandbytes cannot load {folder}: {cause}", "Build the variant again.") from error
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    for part in parts:
        part.compute_dtype = dtype
    model.eval()
    return model


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns fp32 for a CPU, bf16 for a GPU with bf16 tensor cores, and fp16 for other GPUs (T4, Pascal)."""
    import torch

    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else torch.float16


def _require_bitsandbytes() -> None:
    """Raises `ProviderError` if bitsandbytes cannot be imported."""
    # Hides two log messages of bitsandbytes: one about every type conversion, and one about an optional CPU kernel from
    # the Hugging Face hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a binary that was built for another machine can raise any error during the import
        raise ProviderError(f"bitsandbytes cannot be imported: {error}.", install_hint("bnb")) from error


def _head_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the modules outside the encoder."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _check_blocks(model: PreTrainedModel) -> None:
    """Raises `ProviderError` if a layer's input width is not a multiple of `BLOCK`."""
    import torch

    encoder = model.get_submodule(model.base_model_prefix)
    widths = {part.in_features for part in encoder.modules() if isinstance(part, torch.nn.Linear)}
    if odd_widths := sorted(width for width in widths if width % BLOCK):
        raise ProviderError(
            f"bitsandbytes quantises 4-bit weights in blocks of {BLOCK}, and these layer widths are not multiples of "
            f"{BLOCK}: {', '.join(map(str, odd_widths))}.",
            "Quantise to int8 instead.",
        )


def _outline(folder: Path) -> PreTrainedModel:
    """Returns the model that the config in `folder` describes, without weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config.architectures).from_config(config)
    return model


def _has_kernels() -> bool:
    """Returns whether bitsandbytes has a library for PyTorch's CUDA version.

    Without a library for the CUDA version, bitsandbytes uses a mock, which raises an error only when it is called.
    """
    from bitsandbytes import cextension

    return not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)


class BnbSession(TorchSession):
    """A `Session` that runs on bitsandbytes."""

    def _load(self, folder: Path) -> PreTrainedModel:
        import torch

        _require_bitsandbytes()
        device = self._device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < INT8_CAPABILITY and _is_int8(folder):
            raise ProviderError(
                f"{torch.cuda.get_device_name(device)} is too old for LLM.int8(), which needs compute capability 7.5.",
                "Measure bnb-nf4 on this GPU.",
            )
        if device.type == "cuda" and not _has_kernels():
            raise ProviderError(
                f"bitsandbytes has no kernels for CUDA {torch.version.cuda} on this machine.",
                "Install a release for this CUDA version; `python -m bitsandbytes` shows the missing library.",
            )
        return load(folder, device)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `TorchSession`, with the compute type as precision and, on a CPU, a note about speed."""
        facts = {**super().facts(), "precision": str(compute_dtype(self._device)).removeprefix("torch.")}
        return {**facts, "note": "the size of the weights, not speed"} if self._device.type == "cpu" else facts


def _is_int8(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["quantization_config"].get("load_in_8bit"))
