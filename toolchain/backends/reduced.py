"""PyTorch models in fewer bits: half precision, and int8 linear layers whose activations are scaled at run time.

Stored without pickle: integers, scales, zero points and biases are tensors of the weights file, and `PRECISION` beside
it says how they are to be read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, GraphError
from toolchain.models.checkpoints import PRECISION

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PARTS = ("weight", "scales", "zero_points", "bias")
MEND = "Quantise the model again."
HALVES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Precision:
    """How the weights beside it are held: `scheme` is ``bf16``, ``fp16`` or ``int8``; `layers` are the int8 ones."""

    scheme: str
    layers: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Precision | None:
        """What `folder` says of its weights, None where they are fp32; `CheckpointError` for another file."""
        file = folder / PRECISION
        if not file.is_file():
            return None
        try:
            body = json.loads(file.read_text())
            found = cls(body["scheme"], tuple(body["layers"]))
            if found.scheme not in (*HALVES, "int8") or not all(isinstance(name, str) for name in found.layers):
                raise ValueError(f"no scheme {found.scheme!r} of layers by name")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.", MEND) from error
        return found

    def write(self, folder: Path) -> None:
        """Puts `PRECISION` into the folder."""
        (folder / PRECISION).write_text(json.dumps(asdict(self), indent=1) + "\n")


def reduce(model: PreTrainedModel, scheme: str) -> tuple[PreTrainedModel, Precision]:
    """A copy of the fp32 `model` in `scheme`.

    ``int8`` is `torch.ao.quantization.quantize_dynamic` of every linear layer, weights symmetric per output channel.
    Raises `GraphError` where there is no linear layer.
    """
    import torch

    if scheme in HALVES:
        return copy.deepcopy(model).to(getattr(torch, HALVES[scheme])), Precision(scheme)
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    linear = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    if not linear:
        raise GraphError("The model has no linear layer left to quantise.", "Quantise the one it was made from.")
    with _no_notice():
        made = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    return made, Precision(scheme, tuple(linear))


def tensors_of(made: PreTrainedModel, precision: Precision) -> dict[str, torch.Tensor]:
    """What is stored of a reduced model: its weights by name, an int8 layer's in `PARTS`."""
    packed = tuple(f"{name}." for name in precision.layers)
    tensors = {name: tensor for name, tensor in made.state_dict().items() if not (packed and name.startswith(packed))}
    for name in precision.layers:
        module: Any = made.get_submodule(name)
        weight, bias = module._packed_params._weight_bias()
        parts = weight.int_repr(), weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), bias.detach()
        tensors |= {f"{name}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    return tensors


def restore(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], precision: Precision) -> None:
    """Gives an fp32 model of the right shape the stored weights, in place; `CheckpointError` where they do not fit."""
    import torch

    if precision.scheme in HALVES:
        model.to(getattr(torch, HALVES[precision.scheme]))
    left, layers = dict(tensors), {}
    for name in precision.layers:
        try:
            weight, scales, zeros, bias = (left.pop(f"{name}.{part}") for part in PARTS)
            old = model.get_submodule(name)
        except (KeyError, AttributeError) as error:
            raise CheckpointError(f"{PRECISION} names a layer {name!r} that is not there.", MEND) from error
        if not isinstance(old, torch.nn.Linear) or weight.shape != old.weight.shape or weight.dtype != torch.int8:
            raise CheckpointError(f"The stored weights of {name} do not fit the model.", MEND)
        layers[name] = _dynamic(weight, scales, zeros, bias)
    replaced = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    if set(left) != set(model.state_dict()) - replaced:
        raise CheckpointError("The stored weights are not those of the model.", MEND)
    model.load_state_dict(left, strict=False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _dynamic(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor) -> torch.nn.Module:
    """A dynamically quantised linear layer of stored parts."""
    import torch
    from torch.ao.nn.quantized.dynamic import Linear

    with _no_notice():
        made: Any = Linear(weight.shape[1], weight.shape[0], bias_=True, dtype=torch.qint8)
        made.set_weight_bias(torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0), bias)
    layer: torch.nn.Module = made
    return layer


@contextlib.contextmanager
def _no_notice() -> Iterator[None]:
    """PyTorch announces that its quantised tensors will go one day: nothing that the reader of a command can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        yield
