"""What each tool builds its models from; a tool's script reads it in the tool's own environment.

This module imports nothing but the standard library, because an environment may not have the toolchain's packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sources:
    """Paths of the files that a tool builds its models from.

    Attributes:
        checkpoint: Folder of the fine-tuned checkpoint.
        graph: ONNX file of the toolchain's `onnx-std`: the checkpoint, exported in fp32.
        calibration: JSON file with the token ids of the sentences for calibration.
        training: JSON file with the keys ``ids`` and ``labels``: the token ids and the label of each training row that
            the toolchain does not hold out.
        optimum_cli: Path of optimum-cli in the running environment; the file need not exist.
    """

    checkpoint: str
    graph: str
    calibration: str
    training: str
    optimum_cli: str

    def write(self, path: Path) -> None:
        """Writes the paths to a JSON file."""
        path.write_text(json.dumps(asdict(self)))

    def read_calibration(self) -> list[list[int]]:
        """Returns the token ids of the sentences for calibration."""
        rows: list[list[int]] = json.loads(Path(self.calibration).read_text())
        return rows

    def read_training(self) -> tuple[list[list[int]], list[int]]:
        """Returns the token ids and the labels of the training rows."""
        content = json.loads(Path(self.training).read_text())
        return content["ids"], content["labels"]

    def export_with_optimum(self, folder: Path) -> Path:
        """Exports the checkpoint to `folder` with optimum-cli, and returns the path of the fp32 graph."""
        if not Path(self.optimum_cli).is_file():
            sys.exit("The running environment has no optimum-cli. `make install SET=optimum` installs optimum-cli.")
        options = ["--model", self.checkpoint, "--task", "text-classification"]
        subprocess.run([self.optimum_cli, "export", "onnx", *options, folder], check=True)
        return folder / "model.onnx"

    def load_model(self, attention: str = "eager") -> Any:
        """Returns the checkpoint's PyTorch model, with this implementation of attention."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.checkpoint, attn_implementation=attention).eval()

    def classifier(self) -> Any:
        """Returns a PyTorch module that takes token ids and attention mask as positional inputs and returns logits."""
        import torch

        class Classifier(torch.nn.Module):
            def __init__(self, model: torch.nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
                return logits

        return Classifier(self.load_model()).eval()


def head_arrays(model: Any) -> dict[str, Any]:
    """Returns the weights of DistilBERT's classification head, for engines that compute only the encoder."""
    layers = {"pre_": model.pre_classifier, "": model.classifier}
    return {
        f"{prefix}{name}": getattr(layer, name).detach().numpy()
        for prefix, layer in layers.items()
        for name in ("weight", "bias")
    }


def apply_head(head: Mapping[str, Any], first: Any) -> Any:
    """Returns the logits for the hidden states of the first tokens, shape [batch, width], in NumPy."""
    import numpy as np

    hidden = np.maximum(first @ head["pre_weight"].T + head["pre_bias"], 0)
    return hidden @ head["weight"].T + head["bias"]


def new_folder(out: Path, model: str) -> Path:
    """Creates the folder of a model below `out` and returns its path."""
    folder = out / model
    folder.mkdir()
    return folder


def run(build: Callable[[Sources, Path], None]) -> None:
    """Calls a script's function `build` with the sources and the folder of the command line."""
    sources, out = sys.argv[1:]
    build(Sources(**json.loads(Path(sources).read_text())), Path(out))
