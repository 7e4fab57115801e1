"""Errors for weights that exist only as pickle.

Reading a pickle can run code, so the toolchain refuses it. Each error contains a command that converts the weights to
safetensors; the user runs it on a machine where the model is trusted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from toolchain.errors import CheckpointError

_SUFFIXES = (".bin", ".pt", ".pth")
# Files that a training run saves beside the weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
_LOADERS = "from transformers import AutoConfig as C, AutoModelForSequenceClassification as M, AutoTokenizer as T"
_CAUSE = "holds its weights only as pickle ({}), which can run code when it is read."
_MEND = "On a machine where it is trusted, convert it and pass what comes of it: python -c {}"


def among(names: Iterable[str]) -> list[str]:
    """Returns the file names of pickled weights, sorted, with names like `pytorch_model.bin` first."""
    found = [name for name in names if name.endswith(_SUFFIXES) and name not in _NO_WEIGHTS]
    return sorted(found, key=lambda name: (not name.startswith("pytorch_model"), name))


def refusal(where: str, name: str, revision: str | None = None) -> CheckpointError:
    """Returns the error for a model that has pickled weights and no safetensors.

    Args:
        where: Folder or hub id of the model.
        name: File name of the pickled weights.
        revision: Hub revision for the conversion command.
    """
    target = f"{where if Path(where).is_dir() else where.rsplit('/', 1)[-1]}-safetensors"
    place = _text(where) + (f", revision={_text(revision)}" if revision else "")
    if name.startswith("pytorch_model") or not Path(where).is_dir():
        start, model = _LOADERS, f"M.from_pretrained({place})"
    else:
        start = f"import torch; {_LOADERS}"
        model = f"M.from_pretrained(None, config=C.from_pretrained({place}), state_dict={_load(Path(where) / name)})"
    save = f"save_pretrained({_text(target)})"
    code = f"{start}; {model}.{save}; T.from_pretrained({place}).{save}"
    return CheckpointError(f"{where} {_CAUSE.format(name)}", _MEND.format(shlex.quote(code)))


def adapter_refusal(pickled: Path, safe: Path) -> CheckpointError:
    """Returns the error for an adapter with the weights file `pickled`; its command converts it to the file `safe`."""
    code = f"import torch; from safetensors.torch import save_file; save_file({_load(pickled)}, {_text(str(safe))})"
    return CheckpointError(f"{pickled.parent} {_CAUSE.format(pickled.name)}", _MEND.format(shlex.quote(code)))


def _load(file: Path) -> str:
    return f'torch.load({_text(str(file))}, map_location="cpu", weights_only=True)'


def _text(value: str) -> str:
    """Returns a Python literal in double quotes, because the shell command has single quotes around the code."""
    return json.dumps(value, ensure_ascii=False)
