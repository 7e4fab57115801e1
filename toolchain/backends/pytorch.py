"""PyTorch, eager, with scaled-dot-product attention: the baseline every other row is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, ProviderError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


def load_model(folder: Path) -> PreTrainedModel:
    """The sequence classifier in `folder`, in fp32 and eval mode; `CheckpointError` where weights do not fit."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: tuple[PreTrainedModel, dict[str, list[str]]] = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a config can make transformers fail in any way
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be loaded: {cause}", "Check config.json against the weights."
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{folder} has no weights for {named}: its head was never trained.",
            "Pass a fine-tuned sequence classifier.",
        )
    model.eval()
    return model


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
