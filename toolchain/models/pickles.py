"""Errors for weights that exist only as pickle.

Reading a pickle can run code, so the toolchain never reads pickles. Each error contains a command that converts the
weights to safetensors; the user runs it on a machine where the model is trusted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from toolchain.errors import CheckpointError

_SUFFIXES = (".bin", ".pt", ".pth")
# Files that a training run saves beside the weights; they hold no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
_LOADERS = "import transformers as t"
_CAUSE = "{} has its weights only as pickle ({}), and reading a pickle can run code."
_HINT = "Convert the weights on a machine where you trust them, and pass the result: python -c {}"


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Returns the file names of pickled weights, sorted, with names like `pytorch_model.bin` first."""
    file_names = [name for name in names if name.endswith(_SUFFIXES) and name not in _NO_WEIGHTS]
    return sorted(file_names, key=lambda name: (not name.startswith("pytorch_model"), name))


def pickle_error(origin: str, name: str, revision: str | None = None) -> CheckpointError:
    """Returns the error for a model that has pickled weights and no safetensors.

    Args:
        origin: Folder or hub id of the model.
        name: File name of the pickled weights.
        revision: Hub revision for the conversion command.
    """
    target = f"{origin if Path(origin).is_dir() else origin.rsplit('/', 1)[-1]}-safetensors"
    arguments = _quote(origin) + (f", revision={_quote(revision)}" if revision else "")
    model_class = "getattr(t, c.architectures[0])"  # keeps the kind of the model's head
    if name.startswith("pytorch_model") or not Path(origin).is_dir():
        imports, model = _LOADERS, f"{model_class}.from_pretrained({arguments})"
    else:
        imports = f"import torch; {_LOADERS}"
        state = _loading_code(Path(origin) / name)
        model = f"{model_class}.from_pretrained(None, config=c, state_dict={state})"
    save = f"save_pretrained({_quote(target)})"
    config = f"c = t.AutoConfig.from_pretrained({arguments})"
    code = f"{imports}; {config}; {model}.{save}; t.AutoTokenizer.from_pretrained({arguments}).{save}"
    return CheckpointError(_CAUSE.format(origin, name), _HINT.format(shlex.quote(code)))


def adapter_pickle_error(source: Path, target: Path) -> CheckpointError:
    """Returns the error for an adapter with pickled weights; the error's command converts `source` to `target`."""
    save = f"save_file({_loading_code(source)}, {_quote(str(target))})"
    code = f"import torch; from safetensors.torch import save_file; {save}"
    return CheckpointError(_CAUSE.format(source.parent, source.name), _HINT.format(shlex.quote(code)))


def _loading_code(file: Path) -> str:
    return f'torch.load({_quote(str(file))}, map_location="cpu", weights_only=True)'


def _quote(value: str) -> str:
    """Returns a double-quoted Python literal of `value`, because the shell command single-quotes the Python code."""
    return json.dumps(value, ensure_ascii=False)
