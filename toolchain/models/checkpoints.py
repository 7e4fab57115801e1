"""Checkpoint sources (the embedded reference model, a folder, or the hub) and the checks before reading a checkpoint.

This module never runs code from a checkpoint. The module reads weights as safetensors, never as pickle, and never
trusts remote code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.artifacts import store
from toolchain.data.entities import check_names
from toolchain.data.labels import REGRESSION, SEQUENCE_HEAD, TASKS, TOKEN_HEAD, TOKENS, LabelSet, task_of
from toolchain.errors import CheckpointError
from toolchain.models import adapters, hub, locations, pickles
from toolchain.models.locations import Source
from toolchain.models.model_size import require_weights_for
from toolchain.system.decoding import check_line, decode_object, read_bytes

REFERENCE = Path(__file__).parent.parent / "reference" / "model"
REFERENCE_SLUG = "reference"
ROOT_VARIANT = "torch-fp32"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Name of the weights file of a model with pruned or int8 layers, which transformers cannot build. Under the standard
# file name, transformers would load pruned or int8 weights without an error, but the loaded model would be wrong.
OWN_WEIGHTS = "toolchain.safetensors"
# File names of SentencePiece models: the vocabularies of ALBERT, XLM-RoBERTa and DeBERTa-v2.
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "spm.model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    *SENTENCEPIECE_FILES,
)
MAX_NAME = 100  # Maximum number of characters in the name of a model's folder.
FOLDER_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME - 1}}}")  # of a model, under `exported`
# File in the folder of a pruned model, with the numbers of heads and FFN neurons of each layer.
SHAPES = "layer_shapes.json"
# File in the folder of a quantised PyTorch model. The file states in which number format the weights are stored.
PRECISION = "precision.json"
# File in the folder of a model that the toolchain trained, with the training data and settings.
CARD = "training.json"
MODEL_CARD = "README.md"  # File name of the hub's model card; see `model_card`.
REFERENCE_LICENSE, NOT_STATED = "Apache-2.0", "not stated"
_PATTERNS = ("config.json", SHAPES, "*.safetensors", WEIGHTS_INDEX, MODEL_CARD, *TOKENIZER_FILES)


def resolve(model: str, exported: Path, folder_name: str | None = None) -> tuple[str, Source]:
    """Returns the folder name under `exported` and the source for the value of `--model`.

    The value can be ``reference``, an existing folder, a model under `exported` or a hub id; the function tries these
    kinds in order.

    Args:
        model: Value of `--model`.
        exported: The folder of all built models.
        folder_name: Value of `--as`; None to derive the folder name from `model`.

    Raises:
        CheckpointError: No source matches `model`, the folder name is invalid, or the folder belongs to another source.
    """
    source = locate(model, exported)
    folder_name = folder_name or default_folder_name(model)
    if not FOLDER_NAME.fullmatch(folder_name):
        raise CheckpointError(
            f"{folder_name[:MAX_NAME]!r} is not a valid folder name.",
            f"Use at most {MAX_NAME} lower-case letters, digits, '.', '_' and '-'.",
        )
    if folder_name == REFERENCE_SLUG and source.kind != "embedded":
        raise CheckpointError(
            f"{folder_name!r} is the name of the model inside the toolchain package.",
            "Choose another name for this model: --as NAME.",
        )
    owner = _owner(exported / folder_name)
    if owner and not owner.same_origin(source):
        raise CheckpointError(
            f"{exported / folder_name} belongs to {owner.ref}, not to {source.ref}.",
            "Choose another name for this model: --as NAME.",
        )
    return folder_name, replace(source, base=owner.base) if owner else source


def locate(model: str, exported: Path | None = None) -> Source:
    """Returns the source that `model` names; tries the kinds of source in the order of `resolve`.

    The function does not check the checkpoint and does not contact the hub; `pin` and `fetch` do.

    Args:
        model: Value of `--model` or `--base`.
        exported: The folder of all built models; None to ignore the names of built models.

    Raises:
        CheckpointError: No source matches.
    """
    path = Path(model)
    if len(model) > 255 or "\0" in model:
        raise CheckpointError(
            "The model's name is too long, or contains a null character.", "Pass a folder or a hub id."
        )
    if model == REFERENCE_SLUG:
        return Source("embedded", REFERENCE_SLUG)
    if path.is_dir():
        return Source("folder", str(path.resolve()))
    if exported and "/" not in model and (owner := _owner(exported / model)):
        return owner
    if path.exists():
        raise CheckpointError(f"{model} is a file.", "Pass the folder that holds config.json and the weights.")
    if model.startswith((".", "/", "~")) or not hub.HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no folder {model}.", "Pass a folder, a hub id such as user/name, or `reference`."
        )
    return Source("hub", model)


def default_folder_name(model: str) -> str:
    """Returns the folder name under `exported` for the value of `--model`, without `--as`."""
    path = Path(model)
    return _slug(path.resolve().name if path.is_dir() else model)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.rsplit("/", 1)[-1].lower()).strip("-._")[:MAX_NAME] or "model"


def _owner(folder: Path) -> Source | None:
    root = store.load(folder / ROOT_VARIANT) if (folder / ROOT_VARIANT).exists() else None
    return locations.read(folder, Source(**root.manifest.source)) if root else None


def pin(source: Source, revision: str | None = None, *, head: bool = True) -> Source:
    """Returns the source with its exact current revision: the hub's commit, or a digest of the files.

    The function downloads nothing.

    Args:
        source: The source to resolve.
        revision: Branch, tag or commit on the hub; None for the newest commit.
        head: Whether a folder must hold a classifier; see `check`.

    Raises:
        HubError: The hub refuses the model, or is unreachable and the cache has no copy.
        CheckpointError: The checkpoint is unusable, or `revision` is set for a folder.
    """
    if source.kind == "hub":
        commit, names = hub.read_revision(source.ref, revision)
        pickle_names = pickles.pickled_weights(name for name in names if "/" not in name)
        if pickle_names and not any(name.endswith(".safetensors") for name in names):
            raise pickles.pickle_error(source.ref, pickle_names[0], revision)
        return replace(source, revision=commit)
    if revision:
        raise CheckpointError("--revision is for hub models only.", "Run the command without --revision.")
    folder = _folder(source)
    check(folder, head=head)
    return replace(source, revision=_digest(folder))


def fetch(source: Source, revision: str | None = None, *, head: bool = True) -> tuple[Path, Source]:
    """Downloads the checkpoint if necessary, checks it, and returns its folder and its exact source.

    Args:
        source: The source to fetch.
        revision: Branch, tag or commit on the hub; None for the newest commit.
        head: Whether the checkpoint must be a classifier; False for a base to train on. See `check`.

    Raises:
        HubError: The hub refuses the model, or is unreachable and the cache has no copy.
        CheckpointError: The checkpoint is unusable, or `revision` is set for a folder.
    """
    if source.kind != "hub":
        return _folder(source), pin(source, revision, head=head)
    folder = hub.download(source.ref, revision, _PATTERNS)
    if not _has_weights({path.name for path in folder.iterdir()}):
        folder = hub.download(source.ref, revision, (adapters.SETTINGS, *_PATTERNS))
    check(folder, head=head)
    return folder, replace(source, revision=folder.name)  # the name of the snapshot's folder is the commit


def adapter_folder(source: Source) -> Path | None:
    """Returns a folder with the adapter's settings, or None if the source is a model and not an adapter.

    For a source on the hub, the function downloads only the adapter's settings file.
    """
    if source.kind != "hub":
        folder = _folder(source)
        return folder if _is_adapter({path.name for path in folder.iterdir()}) else None
    if not _is_adapter(hub.read_revision(source.ref, source.revision)[1]):
        return None
    return hub.download(source.ref, source.revision, [adapters.SETTINGS])


def _has_weights(names: Set[str]) -> bool:
    return not names.isdisjoint((WEIGHTS, OWN_WEIGHTS, WEIGHTS_INDEX))


def _is_adapter(names: Set[str]) -> bool:
    return adapters.SETTINGS in names and not _has_weights(names)


def _folder(source: Source) -> Path:
    if source.kind == "folder" and not Path(source.ref).is_absolute():
        raise CheckpointError(
            f"The folder {source.ref} of the checkpoint was imported on another machine.",
            "Name its folder on this machine with --model FOLDER --as NAME.",
        )
    return REFERENCE if source.kind == "embedded" else Path(source.ref)


def _digest(folder: Path) -> str:
    weights = adapters.FILES if (folder / adapters.SETTINGS).is_file() else [p.name for p in weight_files(folder)]
    names = ("config.json", SHAPES, WEIGHTS_INDEX, *weights, *TOKENIZER_FILES)
    parts = [f"{name} {store.sha256(folder / name)}" for name in sorted(names) if (folder / name).is_file()]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def config_of(folder: Path) -> dict[str, Any]:
    """Returns the content of a model's config.json.

    Raises:
        CheckpointError: `read_config` raises it, or the config describes a model that is far larger than the weights in
            the folder.
    """
    config = read_config(folder)
    require_weights_for(config, folder)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of the folder's config.json.

    Raises:
        CheckpointError: The file is missing, or does not contain a JSON object.
    """
    file = folder / "config.json"
    try:
        return decode_object(read_bytes(file))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no config.json.", "Pass the folder that `save_pretrained` wrote."
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} does not contain a JSON object: {error}.", "Save the model again with `save_pretrained`."
        ) from error


def weights_of(folder: Path) -> Path:
    """Returns the path of the weights file for a model with one weights file."""
    own_file = folder / OWN_WEIGHTS
    return own_file if own_file.is_file() else folder / WEIGHTS


def weight_files(folder: Path) -> list[Path]:
    """Returns the paths of a checkpoint's safetensors files: one file, or all shards.

    Raises:
        CheckpointError: The folder has no safetensors file, or its index is unreadable, is empty or names a file
            outside the folder.
    """
    return [folder / name for name in sorted(_tensors_by_file(folder))]


def _tensors_by_file(folder: Path) -> dict[str, set[str]]:
    """Returns the names of the weights files, and for each file the names of the tensors in it.

    The tensor names come from the safetensors index. A model with only one weights file has no index, so its set of
    tensor names is empty.
    """
    if weights_of(folder).is_file():
        return {weights_of(folder).name: set()}
    if (folder / WEIGHTS_INDEX).is_file():
        tensors_by_file: dict[str, set[str]] = {}
        try:
            for tensor, name in decode_object(read_bytes(folder / WEIGHTS_INDEX))["weight_map"].items():
                tensors_by_file.setdefault(name, set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} cannot be read.", "Save the model again.") from error
        if not all(
            isinstance(name, str) and name.endswith(".safetensors") and "/" not in name for name in tensors_by_file
        ):
            raise CheckpointError(f"{WEIGHTS_INDEX} names files outside its folder.", "Do not use this checkpoint.")
        if not tensors_by_file:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} names no weights.", "Save the model again.")
        return tensors_by_file
    if pickle_names := pickles.pickled_weights(path.name for path in folder.iterdir()):
        raise pickles.pickle_error(str(folder), pickle_names[0])
    raise CheckpointError(f"{folder} has no {WEIGHTS}.", "Pass the folder that `save_pretrained` wrote.")


def check(folder: Path, *, head: bool = True) -> None:
    """Checks that the folder holds an unquantised model with readable safetensors and a tokenizer, or an adapter.

    Args:
        folder: Folder of the checkpoint.
        head: Whether the checkpoint must be a sequence classifier or an adapter of one. If `head` is False, a model
            without a classification head passes, and an adapter fails.

    Raises:
        CheckpointError: The checkpoint is incomplete, unreadable, already quantised, or of another kind than `head`
            requires.
    """
    _require_regular_files(folder)
    if (folder / adapters.SETTINGS).is_file():
        _check_adapter(folder, head)
        return
    config = config_of(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder} is already quantised.", "Pass the unquantised checkpoint.")
    if head:
        check_config(folder, config)
    for name, expected in sorted(_tensors_by_file(folder).items()):
        if missing_names := sorted(expected - _tensor_names(folder / name)):
            raise CheckpointError(
                f"The weights file {folder / name} lacks {missing_names[0]}, which {WEIGHTS_INDEX} lists for it.",
                "Download the checkpoint again.",
            )
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer.", "Save the tokenizer beside the model: tokenizer.save_pretrained(DIR)."
        )


def _require_regular_files(folder: Path) -> None:
    """Raises `CheckpointError` for a named pipe, a socket or a device, because a reader could wait for it forever."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is not a regular file.", "Delete the file, or download the model again.")


def _check_adapter(folder: Path, head: bool) -> None:
    if _has_weights({path.name for path in folder.iterdir()}):
        raise CheckpointError(
            f"{folder} contains both a model and an adapter ({adapters.SETTINGS}).",
            "Pass a folder with only a model or only an adapter.",
        )
    if not head:
        raise CheckpointError(f"{folder} is a LoRA adapter, not a base.", "Pass the adapter's base instead.")
    adapters.check(folder)
    _tensor_names(folder / adapters.WEIGHTS)


def _tensor_names(file: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file; raises `CheckpointError` if it is unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return set(tensors.keys())
    except FileNotFoundError as error:
        raise CheckpointError(f"The weights file {file} is missing.", "Download the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated, or is not a safetensors file ({error}).", "Download the checkpoint again."
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Returns whether the folder has a tokenizer or vocabulary file; settings files alone do not count."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name not in TOKENIZER_FILES[1:4])


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Checks that `config`, the content of the folder's config.json, describes a classifier of texts or of tokens.

    Raises:
        CheckpointError: The model has no classification head, or its labels are unusable.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if not any(str(name).endswith((SEQUENCE_HEAD, TOKEN_HEAD)) for name in architectures):
        description = ", ".join(map(str, architectures)) or "not stated"
        raise CheckpointError(
            f"{folder} has no classification head: its architecture is {description}.",
            "Fine-tune the model as a classifier of texts or of tokens first. Other tasks are not supported.",
        )
    label_set(folder, config)


def label_set(folder: Path, config: dict[str, Any]) -> LabelSet:
    """Returns the labels and the task of the classifier with this `config`.

    The labels of a token classifier must mark entities.

    Args:
        folder: Folder of the classifier, for error messages.
        config: Content of config.json.

    Raises:
        CheckpointError: The config lacks distinct class names, its task is not in `TASKS`, or the number of labels does
            not fit its task.
    """
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    names = list(labels.values()) if isinstance(labels, dict) else []
    is_numbered = isinstance(labels, dict) and set(labels) == {str(index) for index in range(len(labels))}
    if not (is_numbered and all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)):
        raise CheckpointError(
            f"{folder}: id2label does not map the class indices 0, 1, … to different names.",
            "Correct id2label in config.json.",
        )
    try:
        for name in names:
            check_line(name)
    except ValueError as error:
        raise CheckpointError(f"{folder}: a name in id2label cannot be shown: {error}.", "Rename the label.") from error
    task = task_of(config)
    if task not in TASKS:
        known = ", ".join(name for name in TASKS if name != TOKENS)
        raise CheckpointError(
            f"{folder}: the problem_type {task!r} of config.json is unknown.", f"Use one of: {known}."
        )
    if task == TOKENS and (fault := check_names(names)):
        raise CheckpointError(
            f"{folder} has the labels {', '.join(names)}, but {fault}.",
            "Pass a token classifier whose labels mark entities in the BIO scheme. Other token classifiers are not "
            "supported.",
        )
    if len(names) < 2 and task != REGRESSION:
        raise CheckpointError(
            f"{folder} has one label, but its problem_type is {task}.",
            "Pass a classifier with at least two labels, or set problem_type to regression.",
        )
    if len(names) > 1 and task == REGRESSION:
        raise CheckpointError(
            f"{folder} predicts {len(names)} scores for each text.",
            "Pass a regression model with one score (num_labels=1). Models with several scores are not supported.",
        )
    return LabelSet(tuple(labels[str(index)] for index in range(len(names))), task)
