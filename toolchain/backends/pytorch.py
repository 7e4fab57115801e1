"""PyTorch, eager, with scaled-dot-product attention: the baseline every other row is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends import layout
from toolchain.checkpoints import WEIGHTS
from toolchain.errors import ArtifactError, CheckpointError, ProviderError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


def load_model(folder: Path) -> PreTrainedModel:
    """The sequence classifier in `folder`, in fp32 and eval mode; `CheckpointError` where weights do not fit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes = layout.read_shapes(folder)
    try:
        model, missing = _pruned(folder, shapes) if shapes is not None else _dense(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a config can make transformers fail in any way
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be loaded: {cause}", "Check config.json against the weights."
        ) from error
    if missing:
        named = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{folder} has no weights for {named}: its head was never trained.",
            "Pass a fine-tuned sequence classifier.",
        )
    model.eval()
    return model


def _dense(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    loaded: tuple[PreTrainedModel, dict[str, list[str]]] = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    return loaded[0], sorted(loaded[1]["missing_keys"])


def _pruned(folder: Path, shapes: Sequence[layout.LayerShape]) -> tuple[PreTrainedModel, list[str]]:
    """A model of the config's shape, each layer cut to its own, and then its weights: every one of them, no other."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    layout.reshape(model, shapes)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model, []


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """All that is stored of the model, as one safetensors file; `ArtifactError` where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # so it names a full disk
        mend = "Free the space, or choose another place with --exported DIR."
        raise ArtifactError(f"{folder} cannot be written: {error}.", mend) from error


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The facts of a PyTorch variant: architecture, parameters, bytes by dtype and by part."""
    base = model.base_model_prefix
    by_part, by_dtype = {"embeddings": 0, "encoder": 0, "head": 0}, Counter[str]()
    for name, tensor in model.state_dict().items():
        inside = name.startswith(f"{base}.")
        part = ("embeddings" if ".embeddings." in name else "encoder") if inside else "head"
        size = tensor.numel() * tensor.element_size()
        by_part[part] += size
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += size
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_by_dtype": dict(by_dtype),
        "bytes_by_part": by_part,
    }


class TorchSession:
    """A `Session` on PyTorch."""

    def __init__(self, folder: Path, provider: str, threads: int) -> None:
        import torch

        if provider == "cuda" and not torch.cuda.is_available():
            cuda = torch.version.cuda
            built = f"built for CUDA {cuda} and finds no device" if cuda else "a CPU build"
            raise ProviderError(
                f"PyTorch {torch.__version__} is {built}.", "Install a CUDA build that fits the driver."
            )
        torch.set_num_threads(threads)
        self._device = torch.device(provider)
        self._model = load_model(folder)
        self._model.to(provider)  # type: ignore[arg-type]
        self._threads = threads

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        import torch

        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array).to(self._device) for name, array in batch.items()}
            logits: np.ndarray = self._model(**inputs).logits.float().cpu().numpy()
        return logits

    def facts(self) -> dict[str, Any]:
        """Device, attention implementation, threads, parameters."""
        return {
            "provider": next(self._model.parameters()).device.type,
            "attention": self._model.config._attn_implementation,
            "threads": self._threads,
        }

    def close(self) -> None:
        """See `Session.close`."""
        del self._model
