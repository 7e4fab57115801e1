"""Checks the answers to the questions of `toolchain init`, and reads the facts about the model and the data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts.store import load
from toolchain.data import datasets, folders, inputs
from toolchain.data.datasets import Columns
from toolchain.data.files import TEXT_COLUMNS
from toolchain.data.inputs import HELD_OUT_SPLIT, TrainingSource
from toolchain.data.labels import LabelSet
from toolchain.data.tables import Table
from toolchain.errors import DataError, RecipeError
from toolchain.models import adapters, checkpoints, hub
from toolchain.models.architectures import LAYOUTS
from toolchain.models.locations import Source
from toolchain.recipes.record import ModelRecord, TrainingRecord
from toolchain.recipes.starter import COMPARE, Answers
from toolchain.ship.shipping import check_task
from toolchain.ship.targets import TARGETS
from toolchain.system.decoding import check_line

# Keys of config.json, whose names depend on the architecture
_LAYER_COUNTS = ("n_layers", "num_hidden_layers")
_WIDTHS = ("dim", "hidden_size")
_FFN_WIDTHS = ("hidden_dim", "intermediate_size")
_EXIT_ROWS = 1000  # training rows among which `check_data` looks for rows that exits can use


@dataclass(frozen=True)
class ModelFacts:
    """A checked model.

    Attributes:
        record: The model in the recipe.
        label_set: Labels and task.
        can_prune: Whether pruning supports the architecture.
        can_exit: Whether the model classifies texts with layers so large that exits save work.
        layers: Number of encoder layers; 0 if config.json does not state it.
        option: Value of ``build --model``, which a model outside of the recipe's folder needs; None otherwise.
    """

    record: ModelRecord
    label_set: LabelSet
    can_prune: bool
    can_exit: bool
    layers: int
    option: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """Checked data.

    Attributes:
        record: The data in the recipe.
        bench_rows: Number of texts for the benchmark.
        bench_split: Split for the benchmark; None for ``validation``.
        can_exit: Whether the data has enough training rows for exits.
    """

    record: TrainingRecord
    bench_rows: int
    bench_split: str | None
    can_exit: bool


def check_output(path: Path) -> None:
    """Checks that a recipe can be written to `path`, before anybody answers a question.

    Raises:
        RecipeError: The path exists, or its folder cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise RecipeError(f"{path} exists.", "Name another file with --output, or move the existing one away.")
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        cause = "cannot be written" if folder.is_dir() else "is not a folder"
        raise RecipeError(f"{folder} {cause}.", "Name a file in another folder with --output.")


def check_model(model: str, exported: Path, folder_name: str | None, folder: Path) -> ModelFacts:
    """Checks a model, and returns the facts about it that decide the recipe.

    The function reads the settings of a hub model from the hub, or from the local download cache.

    Args:
        model: Value of ``--model``.
        exported: The folder of all built models.
        folder_name: Value of ``--as``; None for the model's own name.
        folder: Folder of the recipe.

    Raises:
        CheckpointError: No model matches, or the checkpoint is unusable.
        RecipeError: The model is an adapter that is not imported yet, or a recipe cannot hold its name.
    """
    name, source = checkpoints.resolve(model, exported, folder_name)
    imported = exported / name / checkpoints.ROOT_VARIANT
    place = imported if load(imported) else _checkpoint_folder(source)
    config = checkpoints.read_config(place)
    checkpoints.check_config(place, config)
    label_set = checkpoints.label_set(place, config)
    record, option = _model_record(source, name, folder), None
    if source.kind == "folder" and place != imported and _ref_inside(folder, place) is None:
        option = model
    _check_names(record.ref, record.name or "")
    return ModelFacts(
        record,
        label_set,
        config.get("model_type") in LAYOUTS,
        label_set.labels_texts and _has_large_layers(config),
        _number(config, _LAYER_COUNTS),
        option,
    )


def _has_large_layers(config: Mapping[str, Any]) -> bool:
    """Returns whether half of a layer costs more than an exit, or whether the size of a layer is unknown."""
    from toolchain.exits.choice import EXIT_WEIGHTS

    width, ffn_width = _number(config, _WIDTHS), _number(config, _FFN_WIDTHS)
    return not (width and ffn_width) or 4 * width**2 + 2 * width * ffn_width > 2 * EXIT_WEIGHTS


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Returns the number under the first of these keys; 0 if none of them holds a number."""
    return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)


def _model_record(source: Source, name: str, folder: Path) -> ModelRecord:
    """Returns the model as the recipe names it; a folder outside of the recipe's folder has only its name."""
    if source.kind == "embedded":
        return ModelRecord(name=None if name == checkpoints.REFERENCE_SLUG else name)
    stated_name = None if name == checkpoints.default_folder_name(source.ref) else name
    if source.kind == "hub":
        return ModelRecord("hub", source.ref, stated_name)
    path = Path(source.ref)
    ref = _ref_inside(folder, path) if path.is_absolute() else None
    return ModelRecord("folder", ref, stated_name) if ref else ModelRecord("folder", path.name, name)


def _checkpoint_folder(source: Source) -> Path:
    """Returns a folder with the config.json of a checkpoint that is not imported, after a check of a local one."""
    if source.kind == "embedded":
        return checkpoints.REFERENCE
    if source.kind == "hub":
        place = hub.download(source.ref, source.revision, ["config.json", adapters.SETTINGS])
    else:
        place = Path(source.ref)
        checkpoints.check(place)
    if (place / adapters.SETTINGS).is_file():
        raise RecipeError(
            f"{source.ref} is a LoRA adapter, and its base decides which variants fit.",
            "Import the adapter with `toolchain export --model … --as NAME`, and then pass --model NAME.",
        )
    return place


def check_data(spec: str, columns: Columns, label_set: LabelSet, folder: Path) -> DataFacts:
    """Checks labelled data for a model, and returns the facts about it that decide the recipe.

    Args:
        spec: A file, a folder, a hub dataset, or ``sst2`` for the embedded SST-2.
        columns: Names of the text and label columns.
        label_set: Labels of the model.
        folder: Folder of the recipe.

    Raises:
        DataError: The data is unreadable, lacks a column, has too few rows, or has a label that the model lacks.
        RecipeError: The data is outside of the recipe's folder, or a recipe cannot hold the name of a column.
    """
    if spec == datasets.EMBEDDED and not Path(spec).exists():
        rows = len(inputs.load(None, label_set).labels)
        return DataFacts(TrainingRecord(), rows, None, can_exit=True)
    path = datasets.find_file(spec)
    record = TrainingRecord("hub", spec, None, columns.text, columns.pair, columns.label)
    if path is not None:
        ref = _ref_inside(folder, path)
        if ref is None:
            raise RecipeError(
                f"{spec} is outside of the recipe's folder, and a recipe names only data inside.",
                f"Write the recipe beside the data with --output {path.absolute().parent / 'recipe.toml'}, or copy the "
                "data.",
            )
        record = TrainingRecord("file", ref, None, columns.text, columns.pair, columns.label)
    _check_names(record.ref, columns.text or "", columns.pair or "", columns.label)
    data = TrainingSource(spec, columns).load(label_set)
    train_rows, held_out_rows = inputs.hold_out(data)
    has_split = _has_validation_split(spec, path)
    split = None if has_split else HELD_OUT_SPLIT
    rows = len(inputs.load(spec, label_set, columns).labels) if has_split else len(held_out_rows)
    return DataFacts(record, rows, split, _suffices_for_exits(data, train_rows, held_out_rows))


def _has_validation_split(spec: str, path: Path | None) -> bool:
    """Returns whether a folder or a hub dataset has a split ``validation`` apart from its training rows."""
    try:
        if path is None:
            datasets.read_hub(spec, Columns(), inputs.VALIDATION_SPLIT)
            return True
        return path.is_dir() and folders.choose_split(path, None, inputs.VALIDATION_SPLIT) != path
    except DataError:
        return False


def _suffices_for_exits(data: inputs.Data, train_rows: list[int], held_out_rows: list[int]) -> bool:
    from toolchain.build.steps.exits import MIN_TRAINING_ROWS

    return len(inputs.exclude_overlaps(data, train_rows[:_EXIT_ROWS], held_out_rows)) >= MIN_TRAINING_ROWS


def missing_columns(spec: str, columns: Columns) -> tuple[list[str], list[str]]:
    """Returns the columns of a file or folder, and which of ``text`` and ``label`` the user must name.

    Returns:
        The names of all columns, and the roles without a column. Both are empty for a hub dataset, whose columns are
        known only after a download.

    Raises:
        DataError: The file does not exist or is unreadable.
    """
    path = datasets.find_file(spec)
    if path is None or (spec == datasets.EMBEDDED and not path.exists()):
        return [], []
    if path.is_dir():
        path = folders.choose_split(path, None, inputs.TRAIN_SPLIT)
    names: list[str] = []

    def choose(header: list[str]) -> list[str]:
        names.extend(header)
        return header[:1]

    for _ in Table(str(path)).read(choose):
        break
    texts = [columns.text] if columns.text else TEXT_COLUMNS
    roles = ["text"] if not any(name in names for name in texts) else []
    return names, [*roles, *(["label"] if columns.label not in names else [])]


def check_target(target: str, label_set: LabelSet) -> None:
    """Raises `ShippingError` if a bundle for the target cannot have a model of this task."""
    if target != COMPARE:
        check_task(label_set.task, TARGETS[target])


def join(model: ModelFacts, data: DataFacts, target: str, max_drop: float) -> Answers:
    """Returns the checked answers together."""
    return Answers(
        model.record,
        data.record,
        target,
        max_drop,
        data.bench_rows,
        data.bench_split,
        model.can_prune,
        model.can_exit and data.can_exit,
        model.layers,
    )


def _ref_inside(folder: Path, path: Path) -> str | None:
    """Returns a path relative to the recipe's folder; None if it is outside."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return None


def _check_names(*names: str) -> None:
    for name in names:
        try:
            check_line(name)
        except ValueError as error:
            raise RecipeError(f"A recipe cannot hold the name {name[:80]!r}: {error}.", "Rename it.") from error
