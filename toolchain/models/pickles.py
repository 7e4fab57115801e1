"""Weights that are only there as pickle, which can run code when it is read: refused, with the command that converts
them where they are trusted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from toolchain.errors import CheckpointError

_SUFFIXES = (".bin", ".pt", ".pth")
# What training leaves beside the weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
_LOADERS = "from transformers import AutoConfig as C, AutoModelForSequenceClassification as M, AutoTokenizer as T"
_CAUSE = "holds its weights only as pickle ({}), which can run code when it is read."
_MEND = "On a machine where it is trusted, convert it and pass what comes of it: python -c {}"


def among(names: Iterable[str]) -> list[str]:
    """The names that are those of pickled weights, sorted: a `pytorch_model.bin` before others."""
    found = [name for name in names if name.endswith(_SUFFIXES) and name not in _NO_WEIGHTS]
    return sorted(found, key=lambda name: (not name.startswith("pytorch_model"), name))


def refusal(where: str, name: str, revision: str | None = None) -> CheckpointError:
    """The error for a model whose weights are `name` and no safetensors; `where` is its folder or hub id."""
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
    """The error for an adapter whose weights are `pickled` and should be `safe`."""
    code = f"import torch; from safetensors.torch import save_file; save_file({_load(pickled)}, {_text(str(safe))})"
    return CheckpointError(f"{pickled.parent} {_CAUSE.format(pickled.name)}", _MEND.format(shlex.quote(code)))


def _load(file: Path) -> str:
    return f'torch.load({_text(str(file))}, map_location="cpu", weights_only=True)'


def _text(value: str) -> str:
    """As a literal in double quotes, so that the shell's single ones hold the whole."""
    return json.dumps(value, ensure_ascii=False)
