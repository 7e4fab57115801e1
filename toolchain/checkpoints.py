"""Where a model comes from: the embedded reference, a folder, or the hub; and whether it is safe to read.

Nothing here runs code of the checkpoint's: weights are safetensors, never pickle, and remote code is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from toolchain import artifacts
from toolchain.errors import CheckpointError, HubError
from toolchain.labels import MULTI, SINGLE, LabelSet

REFERENCE = Path(__file__).parent / "reference" / "model"
REFERENCE_SLUG = "reference"
ROOT_VARIANT = "torch-fp32"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Beside the config of a pruned model: heads and FFN neurons of each layer.
SHAPES = "layer_shapes.json"
# Beside the config of a quantised PyTorch model: how its weights are held.
PRECISION = "precision.json"
# Beside the config of a model that was trained here: on what and how.
CARD = "training.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """`kind` is embedded, folder or hub; `ref` the folder's absolute path or the hub id; `revision` as in `Import`."""

    kind: str
    ref: str
    revision: str | None = None

    def same_origin(self, other: Source) -> bool:
        """Whether both name the same place, at whatever revision."""
        return (self.kind, self.ref) == (other.kind, other.ref)


def resolve(model: str, exported: Path, slug: str | None = None) -> tuple[str, Source]:
    """What `--model` names: (folder name under `exported`, source).

    Tried in order: ``reference``, an existing folder, a model already under `exported`, a hub id. Raises
    `CheckpointError` where nothing fits, or where the folder name already belongs to another source.
    """
    source = locate(model, exported)
    slug = slug or (
        model if source.kind == "embedded" else _slug(model if source.kind == "hub" else Path(model).resolve().name)
    )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", slug):
        raise CheckpointError(f"{slug!r} cannot name a folder.", "Use lower-case letters, digits, '.', '_' and '-'.")
    if slug == REFERENCE_SLUG and source.kind != "embedded":
        raise CheckpointError(
            f"{slug!r} is the embedded model's name.", "Give this model a name of its own: --as NAME."
        )
    owner = _owner(exported / slug)
    if owner and not owner.same_origin(source):
        raise CheckpointError(
            f"{exported / slug} belongs to {owner.ref}, not to {source.ref}.",
            "Give this model a name of its own: --as NAME.",
        )
    return slug, source


def locate(model: str, exported: Path | None = None) -> Source:
    """The source `model` names, in the order of `resolve`; without `exported` no name of a model built there counts.

    Nothing is read or asked yet: `pin` and `fetch` do, of a base to train on with `head=False`.
    """
    path = Path(model)
    if len(model) > 255 or "\0" in model:
        raise CheckpointError("A model's name is too long.", "Pass a folder or a hub id.")
    if model == REFERENCE_SLUG:
        return Source("embedded", REFERENCE_SLUG)
    if path.is_dir():
        return Source("folder", str(path.resolve()))
    if exported and "/" not in model and (known := _owner(exported / model)):
        return known
    if path.exists():
        raise CheckpointError(f"{model} is a file.", "Pass the folder that holds config.json and the weights.")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no folder {model}.", "Pass a folder, a hub id such as user/name, or `reference`."
        )
    return Source("hub", model)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.rsplit("/", 1)[-1].lower()).strip("-._") or "model"


def _owner(folder: Path) -> Source | None:
    root = artifacts.load(folder / ROOT_VARIANT) if (folder / ROOT_VARIANT).exists() else None
    return Source(**root.manifest.source) if root else None


def pin(source: Source, revision: str | None = None, *, head: bool = True) -> Source:
    """The source with the exact revision it stands for now: the hub's commit, or a digest of the files.

    Downloads nothing. Raises `HubError` where the hub cannot be asked and nothing is cached, `CheckpointError` for a
    folder that is no classifier (`head`: see `check`).
    """
    if source.kind == "hub":
        return replace(source, revision=_ask_hub(source.ref, revision, lambda: _commit(source.ref, revision)))
    if revision:
        raise CheckpointError("--revision is for models of the hub.", "Leave it out for a folder.")
    folder = _folder(source)
    check(folder, head=head)
    return replace(source, revision=_digest(folder))


def fetch(source: Source, revision: str | None = None, *, head: bool = True) -> tuple[Path, Source]:
    """The checkpoint's folder, downloaded if need be and checked, and the source with its exact revision.

    `head=False` is for a base to train on, whose folder need not be a classifier: see `check`.
    """
    if source.kind != "hub":
        return _folder(source), pin(source, revision, head=head)
    folder = _ask_hub(source.ref, revision, lambda: _download(source.ref, revision))
    check(folder, head=head)
    return folder, replace(source, revision=folder.name)  # the snapshot's folder is named by its commit


def _folder(source: Source) -> Path:
    return REFERENCE if source.kind == "embedded" else Path(source.ref)


def _download(ref: str, revision: str | None) -> Path:
    import huggingface_hub

    patterns = ["config.json", SHAPES, "*.safetensors", WEIGHTS_INDEX, *TOKENIZER_FILES]
    return Path(huggingface_hub.snapshot_download(ref, revision=revision, allow_patterns=patterns))


def _commit(ref: str, revision: str | None) -> str:
    """The commit the hub has under that revision; the one that was downloaded where it cannot be reached."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(huggingface_hub.HfApi().model_info(ref, revision=revision).sha)
    except HfHubHTTPError:
        raise
    except OSError:
        return Path(huggingface_hub.snapshot_download(ref, revision=revision, local_files_only=True)).name


T = TypeVar("T")


def _ask_hub(ref: str, revision: str | None, question: Callable[[], T]) -> T:
    """The answer to `question`; whatever the hub raises as a `HubError` in words."""
    from huggingface_hub import errors as hub

    mend = f"Check the id, or download it elsewhere and pass the folder: --model PATH (hub id tried: {ref})."
    try:
        return question()
    except hub.GatedRepoError as error:
        raise HubError(
            f"{ref} is gated on the hub.", "Accept its terms there and log in with `hf auth login`."
        ) from error
    except hub.RevisionNotFoundError as error:
        mend = "Leave --revision out or name a branch, tag or commit."
        raise HubError(f"{ref} has no revision {revision!r}.", mend) from error
    except hub.RepositoryNotFoundError as error:
        raise HubError(f"The hub has no model {ref}, or it is private and no token is set.", mend) from error
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError, OSError) as error:
        raise HubError(f"{ref} is no folder here, and the model hub could not give it.", mend) from error


def _digest(folder: Path) -> str:
    names = ("config.json", SHAPES, *(p.name for p in weight_files(folder)), *TOKENIZER_FILES)
    parts = [f"{name} {artifacts.sha256(folder / name)}" for name in sorted(names) if (folder / name).is_file()]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json; `CheckpointError` where it is missing or no JSON object."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json.", "Pass the folder `save_pretrained` wrote.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is no JSON object: {error}.", "Save the model again with `save_pretrained`."
        ) from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not.

    Raises `CheckpointError` where there are none, or an index names one outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} cannot be read.", "Save the model again.") from error
        if not all(isinstance(name, str) and name.endswith(".safetensors") and "/" not in name for name in names):
            raise CheckpointError(f"{WEIGHTS_INDEX} names files outside its folder.", "Do not use this checkpoint.")
        return [folder / name for name in names]
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights only as pickle ({pickled[0]}), which can run code when it is read.",
            "Where it is trusted: AutoModelForSequenceClassification.from_pretrained(DIR).save_pretrained(NEW).",
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS}.", "Pass the folder `save_pretrained` wrote.")


def check(folder: Path, *, head: bool = True) -> None:
    """Raises `CheckpointError` unless the folder is a model with readable safetensors and a tokenizer, in full
    precision; and, where a trained `head` is asked for, a sequence classifier."""
    from safetensors import SafetensorError, safe_open

    config = config_of(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder} is quantised already.", "Pass the checkpoint it was quantised from.")
    if head:
        _check_config(folder, config)
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np") as tensors:
                tensors.keys()
        except FileNotFoundError as error:
            raise CheckpointError(f"The weights file {file} is missing.", "Download the checkpoint again.") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or no safetensors file ({error}).", "Download the checkpoint again."
            ) from error
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name not in TOKENIZER_FILES[1:4]):
        raise CheckpointError(
            f"{folder} has no tokenizer.", "Save the tokenizer beside the model: tokenizer.save_pretrained(DIR)."
        )


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raises `CheckpointError` unless the config is that of a classifier."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        named = ", ".join(map(str, architectures)) or "of no stated architecture"
        raise CheckpointError(
            f"{folder} is {named}: it has no classification head.", "Fine-tune it as a sequence classifier first."
        )
    label_set(folder, config)


def label_set(folder: Path, config: dict[str, Any]) -> LabelSet:
    """What the classifier in `folder` with this `config` answers with; `CheckpointError` where the config does not say,
    or it answers with a number."""
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    names = list(labels.values()) if isinstance(labels, dict) else []
    whole = isinstance(labels, dict) and set(labels) == {str(index) for index in range(len(labels))}
    if not (whole and all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)):
        raise CheckpointError(
            f"{folder}: id2label does not give each class from 0 on a name of its own.", "Correct it in config.json."
        )
    task = config.get("problem_type") or SINGLE
    if task not in (SINGLE, MULTI) or len(names) < 2:
        raise CheckpointError(
            f"{folder} answers with {'one number' if len(names) < 2 or task == 'regression' else task}, "
            "not with labels of several.",
            "Pass a classifier: regression has no labels to compare.",
        )
    return LabelSet(tuple(labels[str(index)] for index in range(len(names))), task == MULTI)
