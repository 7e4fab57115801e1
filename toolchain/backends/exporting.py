"""A PyTorch model in memory to one ONNX file, by optimum's configuration of its architecture."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AXES = {0: "batch_size", 1: "sequence_length"}


def to_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Writes `target`, whose folder must hold nothing else: inputs of these `names`, dynamic batch and sequence.

    Raises `CheckpointError` for an architecture optimum cannot export, `GraphError` for a model over one file's 2 GB.
    """
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing speaks of constants that stay constant here
        logging.getLogger("optimum").setLevel(logging.ERROR)
        try:
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", model, task="text-classification", library_name="transformers"
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be exported to ONNX by optimum: {error}.", "Use another architecture."
            ) from error
        export(model, _taking(constructor(model.config), names), target, opset=opset, do_constant_folding=True)
    if extra := sorted(p.name for p in target.parent.iterdir() if p != target):
        raise GraphError(
            f"The model is too large for one ONNX file (2 GB): the exporter also wrote {', '.join(extra)}."
        )


def _taking(config: Any, names: Sequence[str]) -> Any:
    """The configuration with these inputs: by itself it asks every BERT for token types, tokenizer and table or not."""
    kind = type(config)
    config.__class__ = type(kind.__name__, (kind,), {"inputs": property(lambda self: dict.fromkeys(names, AXES))})
    return config
