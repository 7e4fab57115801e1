"""Where a model comes from: the embedded reference, a folder, or the hub; and whether it is safe to read.

Nothing here runs code of the checkpoint's: weights are safetensors, never pickle, and remote code is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.artifacts import store
from toolchain.data.labels import MULTI, SINGLE, LabelSet
from toolchain.errors import CheckpointError
from toolchain.models import adapters, hub, pickles

REFERENCE = Path(__file__).parent.parent / "reference" / "model"
REFERENCE_SLUG = "reference"
ROOT_VARIANT = "torch-fp32"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# The weights of layers that transformers cannot make: of pruned and of int8 ones. Under its own name it would load them
# all the same, and answer by random numbers or by integers without their scales.
OWN_WEIGHTS = "toolchain.safetensors"
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
# What a checkpoint's authors say of it, as the hub has it; its front matter may name the licence.
MODEL_CARD, MODEL_CARD_LIMIT = "README.md", 1 << 20  # characters
REFERENCE_LICENSE, NOT_STATED = "Apache-2.0", "not stated"
_PATTERNS = ("config.json", SHAPES, "*.safetensors", WEIGHTS_INDEX, MODEL_CARD, *TOKENIZER_FILES)
# A line of front matter. A YAML parser would follow aliases, which can grow without bound.
_LICENSE_LINE = re.compile(
    r"""^(license|license_name):[ \t]*(["']?)(\w[\w .+()-]{0,99}?)\2[ \t]*(?:#.*)?$""", re.M | re.A
)


@dataclass(frozen=True)
class Source:
    """`kind` is embedded, folder or hub; `ref` the folder's absolute path or the hub id; `revision` as in `Import`.

    `base` is what was given as an adapter's base, as `locate` takes it; empty: the one the adapter names.
    """

    kind: str
    ref: str
    revision: str | None = None
    base: str = ""

    def same_origin(self, other: Source) -> bool:
        """Whether both name the same place, at whatever revision and on whatever base."""
        return (self.kind, self.ref) == (other.kind, other.ref)

    def recorded(self) -> dict[str, Any]:
        """As a manifest states it: a base only where one was given."""
        return {key: value for key, value in asdict(self).items() if key != "base" or value}


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
    return slug, replace(source, base=owner.base) if owner else source


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
    if model.startswith((".", "/", "~")) or not hub.HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no folder {model}.", "Pass a folder, a hub id such as user/name, or `reference`."
        )
    return Source("hub", model)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.rsplit("/", 1)[-1].lower()).strip("-._") or "model"


def _owner(folder: Path) -> Source | None:
    root = store.load(folder / ROOT_VARIANT) if (folder / ROOT_VARIANT).exists() else None
    return Source(**root.manifest.source) if root else None


def pin(source: Source, revision: str | None = None, *, head: bool = True) -> Source:
    """The source with the exact revision it stands for now: the hub's commit, or a digest of the files.

    Downloads nothing. Raises `HubError` where the hub cannot be asked and nothing is cached, `CheckpointError` for what
    is no classifier (`head`: see `check`).
    """
    if source.kind == "hub":
        commit, names = hub.look(source.ref, revision)
        pickled = pickles.among(name for name in names if "/" not in name)
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise pickles.refusal(source.ref, pickled[0], revision)
        return replace(source, revision=commit)
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
    folder = hub.download(source.ref, revision, _PATTERNS)
    if not _whole({path.name for path in folder.iterdir()}):
        folder = hub.download(source.ref, revision, (adapters.SETTINGS, *_PATTERNS))
    check(folder, head=head)
    return folder, replace(source, revision=folder.name)  # the snapshot's folder is named by its commit


def adapter(source: Source) -> Path | None:
    """A folder with an adapter's settings, None where the source is a whole model; of the hub, nothing else is
    downloaded."""
    if source.kind != "hub":
        folder = _folder(source)
        return folder if _adapts({path.name for path in folder.iterdir()}) else None
    if not _adapts(hub.look(source.ref, source.revision)[1]):
        return None
    return hub.download(source.ref, source.revision, [adapters.SETTINGS])


def _whole(names: Set[str]) -> bool:
    return not names.isdisjoint((WEIGHTS, OWN_WEIGHTS, WEIGHTS_INDEX))


def _adapts(names: Set[str]) -> bool:
    return adapters.SETTINGS in names and not _whole(names)


def _folder(source: Source) -> Path:
    return REFERENCE if source.kind == "embedded" else Path(source.ref)


def _digest(folder: Path) -> str:
    weights = adapters.FILES if (folder / adapters.SETTINGS).is_file() else [p.name for p in weight_files(folder)]
    names = ("config.json", SHAPES, WEIGHTS_INDEX, *weights, *TOKENIZER_FILES)
    parts = [f"{name} {store.sha256(folder / name)}" for name in sorted(names) if (folder / name).is_file()]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def license_of(folder: Path) -> str | None:
    """The licence that the checkpoint's model card states; None where it states none, or a list of several."""
    if folder == REFERENCE:
        return REFERENCE_LICENSE
    if not (folder / MODEL_CARD).is_file():
        return None
    with (folder / MODEL_CARD).open(encoding="utf-8-sig", errors="replace") as file:
        front_matter = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", file.read(MODEL_CARD_LIMIT), re.S | re.M)
    stated = {key: value for key, _, value in _LICENSE_LINE.findall(front_matter[1] if front_matter else "")}
    name = stated.get("license")
    return stated.get("license_name", name) if name == "other" else name


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


def weights_of(folder: Path) -> Path:
    """The weights file of a model that is stored in one."""
    own = folder / OWN_WEIGHTS
    return own if own.is_file() else folder / WEIGHTS


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not.

    Raises `CheckpointError` where there are none, or an index names one outside the folder.
    """
    return [folder / name for name in sorted(_tensors_by_file(folder))]


def _tensors_by_file(folder: Path) -> dict[str, set[str]]:
    """Each weights file and the tensors an index says are in it: of a file without an index, none."""
    if weights_of(folder).is_file():
        return {weights_of(folder).name: set()}
    if (folder / WEIGHTS_INDEX).is_file():
        found: dict[str, set[str]] = {}
        try:
            for tensor, name in json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"].items():
                found.setdefault(name, set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} cannot be read.", "Save the model again.") from error
        if not all(isinstance(name, str) and name.endswith(".safetensors") and "/" not in name for name in found):
            raise CheckpointError(f"{WEIGHTS_INDEX} names files outside its folder.", "Do not use this checkpoint.")
        if not found:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} names no weights.", "Save the model again.")
        return found
    if pickled := pickles.among(path.name for path in folder.iterdir()):
        raise pickles.refusal(str(folder), pickled[0])
    raise CheckpointError(f"{folder} has no {WEIGHTS}.", "Pass the folder `save_pretrained` wrote.")


def check(folder: Path, *, head: bool = True) -> None:
    """Raises `CheckpointError` unless the folder is a model with readable safetensors and a tokenizer, in full
    precision; and, where a trained `head` is asked for, a sequence classifier or the adapter of one."""
    if (folder / adapters.SETTINGS).is_file():
        _check_adapter(folder, head)
        return
    config = config_of(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder} is quantised already.", "Pass the checkpoint it was quantised from.")
    if head:
        check_config(folder, config)
    for name, expected in sorted(_tensors_by_file(folder).items()):
        if lacking := sorted(expected - _tensors(folder / name)):
            raise CheckpointError(
                f"The weights file {folder / name} lacks {lacking[0]}, which {WEIGHTS_INDEX} says is in it.",
                "Download the checkpoint again.",
            )
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer.", "Save the tokenizer beside the model: tokenizer.save_pretrained(DIR)."
        )


def _check_adapter(folder: Path, head: bool) -> None:
    if _whole({path.name for path in folder.iterdir()}):
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter ({adapters.SETTINGS}).", "Pass a folder with one of them."
        )
    if not head:
        raise CheckpointError(f"{folder} is a LoRA adapter, not a base.", "Pass the base itself.")
    adapters.check(folder)
    _tensors(folder / adapters.WEIGHTS)


def _tensors(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file; `CheckpointError` where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return set(tensors.keys())
    except FileNotFoundError as error:
        raise CheckpointError(f"The weights file {file} is missing.", "Download the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}).", "Download the checkpoint again."
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's own files lie there."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name not in TOKENIZER_FILES[1:4])


def check_config(folder: Path, config: dict[str, Any]) -> None:
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
