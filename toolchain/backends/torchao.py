"""Linear layers of torchao: int8 weights per output channel, and int8 activations per token.

torchao stores a quantised weight as one tensor of a class of its own. PyTorch can split such a tensor into plain
tensors, so the weights file needs no pickle. torchao builds the tensor itself, both for a new model and for a stored
model. A stored model then gets the values of its plain tensors, so the toolchain needs no constructor of torchao.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, ProviderError, first_line
from toolchain.system.extras import install_hint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantize_layers(model: PreTrainedModel, names: Collection[str]) -> None:
    """Quantises the weights of linear layers, in place.

    Args:
        model: The fp32 model.
        names: Module names of the linear layers.

    Raises:
        ProviderError: torchao is missing, or this release of torchao does not have this kind of quantisation.
    """
    quantize, config = _load_torchao()
    quantize(model, config, lambda _, name: name in names)


def tensors_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns the plain tensors inside the weights of quantised layers, such as integers and scales, by name.

    Args:
        model: The quantised model.
        names: Module names of the quantised layers.
    """
    return {
        f"{name}.weight.{part}": tensor
        for name in names
        for part, tensor in _parts_of(model.get_submodule(name).weight).items()
    }


def restore_layers(model: PreTrainedModel, names: Collection[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Turns linear layers of an fp32 model into stored quantised layers, in place.

    Args:
        model: The fp32 model; its weights are replaced.
        names: Module names of the stored quantised layers.
        tensors: The stored tensors by name, as `tensors_of` returns them.

    Raises:
        CheckpointError: The stored tensors do not match the model, or a release of torchao with another format stored
            them.
        ProviderError: torchao is missing, or this release of torchao does not have this kind of quantisation.
    """
    quantize_layers(model, names)
    for name, part in tensors_of(model, names).items():
        stored = tensors.get(name)
        if stored is None or (stored.shape, stored.dtype) != (part.shape, part.dtype):
            raise CheckpointError(
                f"The stored weights do not match the model, or torchao {_version()} has another format: {name}.",
                "Quantise the model again.",
            )
        part.copy_(stored)


def _parts_of(weight: Any) -> dict[str, torch.Tensor]:
    """Returns the plain tensors inside a weight, as PyTorch's protocol for tensor subclasses names them."""
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def _load_torchao() -> tuple[Callable[..., Any], object]:
    """Imports torchao; returns its function `quantize_`, and the configuration of the quantisation.

    Raises:
        ProviderError: torchao is missing, or this release of torchao does not have this kind of quantisation.
    """
    try:
        import torchao  # noqa: F401
    except Exception as error:  # a binary for another release of PyTorch can raise any error during the import
        raise ProviderError(f"torchao cannot be imported: {first_line(error)}.", install_hint("torchao")) from error
    try:
        from torchao import quantize_
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        # By default, this configuration changes settings of PyTorch's compiler, for all models of the process.
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    except (ImportError, TypeError) as error:
        raise ProviderError(
            f"torchao {_version()} cannot run torchao-int8: {first_line(error)}.",
            "Measure torch-int8 or onnx-int8 instead, or install an earlier release of torchao.",
        ) from error
    return quantize_, config


def _version() -> str:
    return importlib.metadata.version("torchao")
