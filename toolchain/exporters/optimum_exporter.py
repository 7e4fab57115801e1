"""Export with the configurations of optimum-onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.labels import TOKEN_HEAD
from toolchain.errors import CheckpointError
from toolchain.exporters import INPUT_AXES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Exports the model to `target`; see `exporters.to_onnx`."""
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about values that become constants; these values never change
        logging.getLogger("optimum").setLevel(logging.ERROR)
        try:
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", model, task=_task(model), library_name="transformers"
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"optimum cannot export {type(model).__name__} to ONNX: {error}.",
                "Use --exporter torch.",
            ) from error
        export(model, _with_inputs(constructor(model.config), names), target, opset=opset, do_constant_folding=True)


def _task(model: PreTrainedModel) -> str:
    """Returns optimum's name of the model's task."""
    return "token-classification" if type(model).__name__.endswith(TOKEN_HEAD) else "text-classification"


def _with_inputs(config: Any, names: Sequence[str]) -> Any:
    """Sets the inputs of the export configuration to `names`, because optimum always adds token_type_ids for BERT."""
    kind = type(config)
    inputs = dict.fromkeys(names, INPUT_AXES)
    config.__class__ = type(kind.__name__, (kind,), {"inputs": property(lambda self: inputs)})
    return config
