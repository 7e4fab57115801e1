"""bitsandbytes through transformers: 8- and 4-bit weights that save memory; on a CPU they cost time."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.pytorch import TorchSession, quiet
from toolchain.errors import CheckpointError, ProviderError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INT8_CAPABILITY = (7, 5)  # LLM.int8() needs the integer tensor cores that came with Turing
BF16_CAPABILITY = (8, 0)
BLOCK = 64  # weights that share a scale


def quantized(folder: Path, scheme: str) -> PreTrainedModel:
    """The fp32 model in `folder`, on the CPU, its encoder's linear layers in ``int8``, ``nf4`` or ``fp4``; the head
    stays as it is. Raises `ProviderError` where bitsandbytes is missing or has no kernel for the model's widths."""
    import torch
    from transformers import BitsAndBytesConfig

    _need()
    outline = _outline(folder)
    skipped = _head(outline)
    if scheme != "int8":
        _check_blocks(outline)
    if scheme == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
    return load(folder, torch.device("cpu"), quantization_config=config)


def load(folder: Path, where: torch.device, **more: Any) -> PreTrainedModel:
    """The model in `folder` on that device, computing in the type that is fast there."""
    from transformers import AutoModelForSequenceClassification

    quiet()
    dtype = compute_dtype(where)
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": where},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **more,
        )
    except Exception as error:  # a config can make transformers fail in any way
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded by bitsandbytes: {cause}", "Build it again.") from error
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    for part in parts:
        part.compute_dtype = dtype
    model.eval()
    return model


def compute_dtype(where: torch.device) -> torch.dtype:
    """fp32 on a CPU; on a GPU bf16 where it has tensor cores for it, else fp16 (T4, Pascal)."""
    import torch

    if where.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(where) >= BF16_CAPABILITY else torch.float16


def _need() -> None:
    """Raises `ProviderError` where bitsandbytes cannot be imported."""
    # A line for every product it casts, and one for a kernel that only a hub has.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a library for another machine fails while it is loaded
        raise ProviderError(
            f"bitsandbytes cannot be used: {error}.", 'Install it with `pip install -e ".[bnb]"`.'
        ) from error


def _head(model: PreTrainedModel) -> list[str]:
    """The names of the modules outside the encoder."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _check_blocks(model: PreTrainedModel) -> None:
    """Raises `ProviderError` for a layer whose rows are not whole blocks of 4-bit weights."""
    import torch

    encoder = model.get_submodule(model.base_model_prefix)
    widths = {part.in_features for part in encoder.modules() if isinstance(part, torch.nn.Linear)}
    if odd := sorted(width for width in widths if width % BLOCK):
        raise ProviderError(
            f"bitsandbytes packs 4-bit weights in blocks of {BLOCK}, and the model has layers of width "
            f"{', '.join(map(str, odd))}.",
            "Quantise to int8 instead.",
        )


def _outline(folder: Path) -> PreTrainedModel:
    """The model of the config in `folder`, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def _has_kernels() -> bool:
    """Whether bitsandbytes found its library for this CUDA; it stands a mock in its place and fails when asked."""
    from bitsandbytes import cextension

    return not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)


class BnbSession(TorchSession):
    """A `Session` on bitsandbytes."""

    def _load(self, folder: Path) -> PreTrainedModel:
        import torch

        _need()
        where = self._device
        if where.type == "cuda" and torch.cuda.get_device_capability(where) < INT8_CAPABILITY and _int8(folder):
            raise ProviderError(
                f"{torch.cuda.get_device_name(where)} lacks what LLM.int8() needs: compute capability 7.5.",
                "Measure bnb-nf4 there.",
            )
        if where.type == "cuda" and not _has_kernels():
            raise ProviderError(
                f"bitsandbytes has no kernels for CUDA {torch.version.cuda} on this machine.",
                "Install a release built for it; `python -m bitsandbytes` says what it looked for.",
            )
        return load(folder, where)

    def facts(self) -> dict[str, Any]:
        """As of PyTorch, with the type it computes in; on a CPU, what the row is good for."""
        found = {**super().facts(), "precision": str(compute_dtype(self._device)).removeprefix("torch.")}
        return {**found, "note": "memory, not speed"} if self._device.type == "cpu" else found


def _int8(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["quantization_config"].get("load_in_8bit"))
