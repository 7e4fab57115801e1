"""Quantised PyTorch models: half precision, or dynamic quantisation of the linear layers to int8, also with torchao.

The models are stored without pickle. The weights file holds integers, scales, zero points and biases as tensors. The
file `PRECISION` beside the weights file states the scheme and the int8 layers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends import torchao
from toolchain.errors import CheckpointError, GraphError, ProviderError
from toolchain.models.checkpoints import PRECISION
from toolchain.system.decoding import Line, decode, read_bytes, strict

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PARTS = ("weight", "scales", "zero_points", "bias")
HINT = "Quantise the model again."
HALF_TYPES = {"bf16": "bfloat16", "fp16": "float16"}
TORCHAO = "torchao-int8"


@strict
@dataclass(frozen=True)
class Precision:
    """The storage format of a model's weights.

    Attributes:
        scheme: Scheme of the quantisation: ``bf16``, ``fp16``, ``int8`` or `TORCHAO`.
        layers: Module names of the int8 layers.
    """

    scheme: Line
    layers: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in (*HALF_TYPES, "int8", TORCHAO):
            raise ValueError(f"the scheme {self.scheme!r} is unknown")

    @property
    def number_format(self) -> str:
        """Returns the number format of the linear layers: ``bf16``, ``fp16`` or ``int8``."""
        return "int8" if self.scheme == TORCHAO else self.scheme

    @classmethod
    def read(cls, folder: Path) -> Precision | None:
        """Reads the file `PRECISION` in `folder`; returns None for fp32 weights, which have no such file.

        Raises:
            CheckpointError: The file cannot be read, or does not hold a `Precision`.
        """
        file = folder / PRECISION
        if not file.is_file():
            return None
        try:
            return decode(cls, read_bytes(file))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.", HINT) from error

    def write(self, folder: Path) -> None:
        """Writes the file `PRECISION` into the folder."""
        (folder / PRECISION).write_text(json.dumps(asdict(self), indent=1) + "\n")


def reduce(model: PreTrainedModel, scheme: str) -> tuple[PreTrainedModel, Precision]:
    """Returns a quantised copy of an fp32 model, and the `Precision` of this copy.

    For ``int8``, `torch.ao.quantization.quantize_dynamic` quantises every linear layer, with symmetric weights per
    output channel. For `TORCHAO`, torchao quantises the same layers.

    Args:
        model: The fp32 model.
        scheme: Scheme of the quantisation: ``bf16``, ``fp16``, ``int8`` or `TORCHAO`.

    Raises:
        GraphError: The scheme is an int8 scheme and the model has no linear layer.
        ProviderError: The scheme is an int8 scheme, and the installed PyTorch or torchao does not have it.
    """
    import torch

    if scheme in HALF_TYPES:
        return copy.deepcopy(model).to(getattr(torch, HALF_TYPES[scheme])), Precision(scheme)
    layer_names = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    if not layer_names:
        raise GraphError("The model has no linear layer left to quantise.", "Quantise the parent of the model.")
    if scheme == TORCHAO:
        quantized_model = copy.deepcopy(model)
        torchao.quantize_layers(quantized_model, layer_names)
        return quantized_model, Precision(scheme, tuple(layer_names))
    with _translate_missing_modules():
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    with _hide_deprecation():
        quantized_model = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    return quantized_model, Precision(scheme, tuple(layer_names))


def tensors_of(model: PreTrainedModel, precision: Precision) -> dict[str, torch.Tensor]:
    """Returns the tensors to store for a quantised model, by name.

    An int8 layer has four tensors: weight, scales, zero points and bias. A layer of torchao has the tensors that
    `torchao.tensors_of` returns, and its bias.
    """
    if precision.scheme == TORCHAO:
        weights = {f"{name}.weight" for name in precision.layers}
        others = {name: tensor for name, tensor in model.state_dict().items() if name not in weights}
        return others | torchao.tensors_of(model, precision.layers)
    prefixes = tuple(f"{name}." for name in precision.layers)
    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if not (prefixes and name.startswith(prefixes))
    }
    for name in precision.layers:
        module: Any = model.get_submodule(name)
        weight, bias = module._packed_params._weight_bias()
        parts = weight.int_repr(), weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), bias.detach()
        tensors |= {f"{name}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    return tensors


def restore(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], precision: Precision) -> None:
    """Loads the stored weights of a quantised model into an fp32 model of the same shape, in place.

    Args:
        model: The fp32 model; its weights are replaced.
        tensors: The stored tensors by name, as `tensors_of` returns them.
        precision: Scheme and int8 layers of the stored tensors.

    Raises:
        CheckpointError: The tensors do not match the model.
    """
    import torch

    if precision.scheme in HALF_TYPES:
        model.to(getattr(torch, HALF_TYPES[precision.scheme]))
    _require_linear_layers(model, precision.layers)
    names, dynamic_layers = set(model.state_dict()), {}
    if precision.scheme == TORCHAO:
        torchao.restore_layers(model, precision.layers, tensors)
        replaced_names = {f"{name}.weight" for name in precision.layers}
        int8_names = set(torchao.tensors_of(model, precision.layers))
    else:
        dynamic_layers = _build_dynamic_layers(model, precision.layers, tensors)
        replaced_names = int8_names = {f"{name}.{part}" for name in precision.layers for part in PARTS}
    other_names = names - replaced_names
    if set(tensors) != other_names | int8_names:
        raise CheckpointError("The stored weights belong to another model.", HINT)
    model.load_state_dict({name: tensors[name] for name in other_names}, strict=False)
    for name, layer in dynamic_layers.items():  # only now, because PyTorch cannot leave these layers out when it loads
        model.set_submodule(name, layer)


def _require_linear_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raises `CheckpointError` if the model does not have all of the linear layers."""
    import torch

    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), torch.nn.Linear):
            raise CheckpointError(
                f"The file {PRECISION} lists the int8 layer {name!r}, but the model has no such linear layer.", HINT
            )


def _build_dynamic_layers(
    model: PreTrainedModel, names: Iterable[str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.nn.Module]:
    """Returns the stored layers of PyTorch's dynamic quantisation, by module name; checks them against the model."""
    import torch

    layers = {}
    for name in names:
        try:
            weight, scales, zeros, bias = (tensors[f"{name}.{part}"] for part in PARTS)
        except KeyError as error:
            raise CheckpointError(f"The weights file has no int8 layer {name!r}.", HINT) from error
        module: Any = model.get_submodule(name)
        if weight.shape != module.weight.shape or weight.dtype != torch.int8:
            raise CheckpointError(f"The stored weights of {name} do not match the model.", HINT)
        layers[name] = _build_dynamic_layer(weight, scales, zeros, bias)
    return layers


def _build_dynamic_layer(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor
) -> torch.nn.Module:
    """Builds a dynamically quantised linear layer from its stored tensors."""
    import torch

    with _translate_missing_modules():
        from torch.ao.nn.quantized.dynamic import Linear
    with _hide_deprecation():
        quantized_layer: Any = Linear(weight.shape[1], weight.shape[0], bias_=True, dtype=torch.qint8)
        quantized_layer.set_weight_bias(torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0), bias)
    layer: torch.nn.Module = quantized_layer
    return layer


@contextlib.contextmanager
def _translate_missing_modules() -> Iterator[None]:
    """Converts a failed import to `ProviderError`, because PyTorch plans to remove its module torch.ao.quantization."""
    import torch

    try:
        yield
    except ImportError as error:
        raise ProviderError(
            f"PyTorch {torch.__version__} cannot run torch-int8: {error}.",
            "Measure torch-compile-bf16 or onnx-int8 instead, or install an earlier release of PyTorch.",
        ) from error


@contextlib.contextmanager
def _hide_deprecation() -> Iterator[None]:
    """Hides PyTorch's deprecation warning about quantised tensors, because a user of the command cannot fix it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        yield
