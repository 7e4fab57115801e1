"""Fine-tuning: trains a base model on labelled texts and writes a checkpoint folder for the option `--model`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolchain
from toolchain.artifacts import publishing
from toolchain.artifacts.steps import Import
from toolchain.build.job import Job
from toolchain.build.steps.importing import import_checkpoint
from toolchain.data import inputs, labels
from toolchain.data.datasets import LabelledTable
from toolchain.data.encoding import Encoder
from toolchain.data.entities import check_names, kind_of_entity
from toolchain.data.inputs import Data, TrainingSource
from toolchain.data.labels import (
    MULTI,
    REGRESSION,
    SEQUENCE_HEAD,
    SINGLE,
    TOKEN_HEAD,
    TOKENS,
    Answer,
    LabelSet,
    number,
)
from toolchain.errors import ArtifactError, CheckpointError, DataError
from toolchain.models import checkpoints
from toolchain.models.locations import Source
from toolchain.progress import Bar, Say
from toolchain.results import statistics
from toolchain.results.scores import EntityScore, RegressionScore, score_answers
from toolchain.system import files
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.training.batches import batches
from toolchain.training.card import read_card
from toolchain.training.loop import Examples, Recipe, train
from toolchain.training.scoring import BATCH, answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = checkpoints.CARD
LABEL_WEIGHT = 0.5  # Weight of the labels in the loss with a teacher; the teacher's logits have the same weight.
_HINT = "Move the existing folder away, or choose another folder with --output."


@dataclass(frozen=True)
class FinetuneRequest:
    """Inputs of a fine-tuning run.

    Attributes:
        base: The model to train: a folder, a hub id or `reference`.
        train: Training data.
        recipe: Settings of the training.
        output: The checkpoint folder to write.
        revision: Hub revision of `base`.
        teacher: A classifier whose logits the model learns in addition to the labels; None without a teacher.
        labels: Labels of a new head, in order; if empty, the labels of the base or the data.
        task: Task of the model, one of `labels.TASKS`; None for the base's task, or for one label per text if the base
            has no labels or does not have the labels of the data.
        max_length: Maximum number of tokens of a training text.
        data: Data on which the trained model is scored. If `data` is None and `train` is the SST-2 of this
            package, the model is scored on the SST-2 validation set of this package. If `data` is None and `train` is
            other data, the model is scored on the held-out rows of that data.
    """

    base: str
    train: TrainingSource
    recipe: Recipe
    output: Path
    revision: str | None = None
    teacher: str | None = None
    labels: tuple[str, ...] = ()
    task: str | None = None
    max_length: int | None = None
    data: str | None = None


def make_recipe(epochs: int, learning_rate: float, batch_size: int, seed: int, *, has_teacher: bool) -> Recipe:
    """Returns the settings of a fine-tuning run, which keeps the best of all epochs; see `Recipe` for the arguments."""
    weight = LABEL_WEIGHT if has_teacher else 1.0
    return Recipe(epochs, learning_rate, batch_size, seed, states=0.0, patience=epochs, task=weight, dropout=True)


def finetune(request: FinetuneRequest, say: Say, bar: Bar) -> dict[str, Any]:
    """Trains a checkpoint, writes it to the request's output folder, and returns the content of its training.json.

    If a run with the same settings was interrupted, the function continues that run.

    Raises:
        CheckpointError: The base or the teacher is not usable.
        DataError: The training data are not usable.
        ArtifactError: The output folder exists, and does not come from a request with the same settings.
    """
    base = checkpoints.locate(request.base)
    folder, base = checkpoints.fetch(base, request.revision, head=False)
    table = request.train.read()
    _check_texts(table)
    base_labels = _base_labels(folder)
    label_set, keep = _choose_labels(request, table, base_labels)
    rows = inputs.data_from_table(table, label_set)
    say(_count_summary(rows, base_labels if keep else None))
    embedded = request.train.file is None
    scoring_data = inputs.load(request.data, label_set, request.train.columns) if request.data or embedded else None
    teacher = _fetch_teacher(request.teacher, label_set)
    settings = {
        "base": {**asdict(base), "ref": Path(base.ref).name if base.kind == "folder" else base.ref},
        "train": request.train.digest,
        "labels": list(label_set.names),
        "task": label_set.task,
        "max_length": request.max_length,
        "teacher": teacher[1].revision if teacher else None,
        "recipe": asdict(request.recipe),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    output = request.output
    with publishing.lock(output, lambda: say(f"{output}: waiting, because another run is writing to this folder")):
        resume = publishing.work_folder(output) / "training"
        if finished_card := _finished_card(output, key):
            shutil.rmtree(resume, ignore_errors=True)  # a run that was killed at its end has not deleted it
            say(f"{output}: unchanged, because a run with the same settings already finished")
            return finished_card
        with publishing.scratch_folder(output) as scratch:
            start = scratch / "start"
            _write_start(folder, start, rows, keep, request.recipe.seed)
            encoder = _import(start, scratch, resume, request.max_length)
            shutil.rmtree(start)
            model, history = _train_model(
                scratch, encoder, rows, (teacher and teacher[0], request.recipe), (resume, key), bar
            )
            scores = _score(model, encoder, scoring_data or rows.select(inputs.hold_out(rows)[1]))
            card = {"toolchain": toolchain.__version__, "key": key, **settings, "training": history, "judged": scores}
            (scratch / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            publishing.replace(scratch, output)
        shutil.rmtree(resume, ignore_errors=True)
    return card


def _check_texts(table: LabelledTable) -> None:
    """Raises `DataError` if a text is empty, since a model cannot learn from it."""
    empty = [
        number
        for number, text in enumerate(table.texts, start=1)
        if not all(part.strip() for part in ([text] if isinstance(text, str) else text))
    ]
    if empty:
        raise DataError(
            f"{table.column.source}: {len(empty)} rows have an empty text; the first is row {empty[0]}.",
            "Add the missing texts, or remove the rows without a text.",
        )


def _base_labels(folder: Path) -> LabelSet | None:
    """Returns the labels of the base; None for a base without a head, or with a head of another kind."""
    config = checkpoints.config_of(folder)
    kinds = [str(name) for name in config.get("architectures") or []]
    names = list((config.get("id2label") or {}).values())
    marks_entities = any(kind.endswith(TOKEN_HEAD) for kind in kinds) and not check_names(names)
    if not marks_entities and not any(kind.endswith(SEQUENCE_HEAD) for kind in kinds):
        return None
    return checkpoints.label_set(folder, config)


def _choose_labels(
    request: FinetuneRequest, table: LabelledTable, base_labels: LabelSet | None
) -> tuple[LabelSet, bool]:
    """Returns the model's labels, and whether the training continues with the base's head.

    The training continues if the request names neither labels nor another task, and the base has the labels of the
    data. A base that has none of the data's labels gets a new head. If the base has only some of the data's labels, the
    function raises `DataError`, because the other labels may be misspelt.
    """
    if request.labels or base_labels is None or request.task not in (None, base_labels.task):
        label_set = labels.label_set(table.column, request.labels, request.task or SINGLE)
        label_set.answers(table.column)  # `answers` raises `DataError` for an unknown label.
        return label_set, label_set == base_labels
    try:
        inputs.data_from_table(table, base_labels)
        return base_labels, True
    except DataError:
        # Without a stated task, data with answers of another kind give a base of texts a new head.
        other_task = SINGLE if base_labels.task in (REGRESSION, TOKENS) else base_labels.task
        label_set = labels.label_set(table.column, (), request.task or other_task)
    if label_set.task == base_labels.task:
        shared_names = _folded_names(base_labels) & _folded_names(label_set)
        if shared_names or (label_set.has_default_names and not base_labels.has_default_names):
            raise DataError(
                f"{request.base} has the labels {', '.join(base_labels.names)}, but {table.column.source} has "
                f"{', '.join(label_set.names)}.",
                f"Correct the data, or name the labels of a new head: --labels {','.join(label_set.names)}",
            ) from None
    return label_set, False


def _folded_names(label_set: LabelSet) -> set[str]:
    """Returns the label names without case, and without labels for words outside of entities."""
    names = label_set.names
    if label_set.task == TOKENS:
        names = tuple(name for name in names if kind_of_entity(name))
    return {name.casefold() for name in names}


def _count_summary(rows: Data, kept_labels: LabelSet | None) -> str:
    """Returns a one-line summary with the number of texts of each label, or with the range of the scores."""
    head = "training continues with the base's head" if kept_labels else "the model gets a new head"
    if rows.label_set.task == REGRESSION:
        scores = [number(answer) for answer in rows.labels]
        low, high = (rows.label_set.format_answer(score) for score in (min(scores), max(scores)))
        return f"{rows.name} has {len(rows.labels)} rows with scores from {low} to {high}; {head}"
    names = rows.label_set.names
    separator = {MULTI: labels.SEPARATOR, TOKENS: " "}.get(rows.label_set.task)
    if separator:
        counts = Counter(
            name for answer in rows.labels for name in rows.label_set.format_answer(answer).split(separator)
        )
    else:
        counts = Counter(map(rows.label_set.format_answer, rows.labels))
    counts_text = ", ".join(f"{index} {name} ({counts[name]})" for index, name in enumerate(names))
    kinds = {MULTI: "any number of labels per text", TOKENS: "one label per word"}
    kind = kinds.get(rows.label_set.task, "one label per text")
    return f"{rows.name} has {len(rows.labels)} rows with {kind}: {counts_text}; {head}"


def _fetch_teacher(name: str | None, label_set: LabelSet) -> tuple[Path, Source] | None:
    """Returns the teacher's folder and source; raises `CheckpointError` if the teacher's labels are not `label_set`."""
    if name is None:
        return None
    folder, source = checkpoints.fetch(checkpoints.locate(name))
    teacher_labels = checkpoints.label_set(folder, checkpoints.config_of(folder))
    if teacher_labels.task != label_set.task:
        raise CheckpointError(
            f"The task of the teacher {name} is {teacher_labels.task}, but the task of the model is {label_set.task}.",
            "Use a teacher with the model's task.",
        )
    if teacher_labels != label_set and label_set.task != REGRESSION:
        raise CheckpointError(
            f"The teacher {name} has the labels {', '.join(teacher_labels.names)}, but the model has "
            f"{', '.join(label_set.names)}.",
            "Use a teacher with the same labels in the same order, or set the labels with --labels.",
        )
    return folder, source


def _finished_card(output: Path, key: str) -> dict[str, Any] | None:
    """Returns the content of training.json in `output`; None if `output` does not exist.

    Raises `ArtifactError` if `output` is not the result of the fine-tuning run with this `key`.
    """
    if not (output.exists() or output.is_symlink()):
        return None
    try:
        if decode_object(read_bytes(output / CARD))["key"] == key:
            return dict(read_card(output / CARD))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{output} exists, and `toolchain finetune` did not write it.", _HINT) from error
    raise ArtifactError(f"{output} exists, and was trained with other settings.", _HINT)


def _write_start(folder: Path, start: Path, rows: Data, keep: bool, seed: int) -> None:
    """Writes the base's tokenizer and model to `start`; the model keeps its classification head or gets a new one."""
    import torch

    from toolchain.backends.pytorch import load_base

    torch.manual_seed(seed)
    label_set = rows.label_set
    model = load_base(folder, label_set.names, label_set.task, keep)
    if label_set.task == REGRESSION and not keep:
        # The head starts at the mean score, because training would need many steps to move it far from 0.
        head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
        torch.nn.init.constant_(head.bias, sum(map(number, rows.labels)) / len(rows.labels))
    with files.writing_in_rust(start):
        model.save_pretrained(start, safe_serialization=True, max_shard_size="1TB")
    for name in checkpoints.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, start / name)


def _import(start: Path, scratch: Path, resume: Path, max_length: int | None) -> Encoder:
    """Imports the checkpoint in `start` into `scratch`; returns an encoder for texts of at most `max_length` tokens."""
    job = Job(Import(), None, start, scratch, None, TrainingSource(), resume, resume, lambda *_: None)
    imported = import_checkpoint(job)
    if max_length and max_length > imported.max_length:
        raise DataError(
            f"The base takes at most {imported.max_length} tokens, not {max_length}.", "Choose a smaller --max-length."
        )
    return Encoder.open(scratch, [spec.name for spec in imported.inputs], max_length or imported.max_length)


def _train_model(
    scratch: Path,
    encoder: Encoder,
    rows: Data,
    teacher_and_recipe: tuple[Path | None, Recipe],
    resume: tuple[Path, str],
    bar: Bar,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Trains the model in `scratch` and stores its new weights there; returns the model and the training history."""
    from toolchain.backends.pytorch import check_stored, load_model, save_weights

    model = load_model(scratch)
    teacher = _load_teacher(teacher_and_recipe[0], encoder) if teacher_and_recipe[0] else None
    training_rows, held_out = (rows.select(part) for part in inputs.hold_out(rows))
    with bar("finetune") as progress:
        progress(0, 1, "reading the training data")
        train_ids, held_out_ids = (encoder.encode(part.texts) for part in (training_rows, held_out))
        examples = (
            Examples(train_ids, training_rows.targets(train_ids)),
            Examples(held_out_ids, held_out.targets(held_out_ids)),
        )
        history = train((model, teacher), examples, encoder, teacher_and_recipe[1], resume, progress)
    save_weights(model.state_dict(), scratch)
    check_stored(model, scratch, encoder.names)
    return model, history


def _load_teacher(folder: Path, encoder: Encoder) -> PreTrainedModel:
    """Returns the teacher model.

    Raises `CheckpointError` if teacher and student have different vocabularies, because both get the same token ids.
    """
    from toolchain.backends.pytorch import load_model

    teacher_encoder = Encoder.open(folder, encoder.names, encoder.max_length)
    if teacher_encoder.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
        raise CheckpointError(
            "The teacher has another vocabulary than the base.", "Use a teacher with the base's vocabulary."
        )
    return load_model(folder)


def _score(model: PreTrainedModel, encoder: Encoder, data: Data) -> dict[str, Any]:
    """Returns the number of rows in `data`, and the model's scores on these rows.

    The scores of a classifier are accuracy, balanced accuracy and macro-F1. For the accuracy, a multi-label row is
    correct only if all its labels are correct. The scores of a regression model are R² and the errors. The scores of a
    token classifier are F1, precision and recall of entities; words beyond the encoder's `max_length` do not count.
    """
    ids = encoder.encode(data.texts)
    rows = batches(ids, data.targets(ids), encoder, BATCH)
    predictions: list[Answer] = [0] * len(data.labels)
    correct: list[Answer] = [0] * len(data.labels)
    for part in rows:
        for row, answer in zip(part.rows, part.answers, strict=True):
            correct[row] = answer
    for row, answer in answers(model, rows):
        predictions[row] = answer
    score = score_answers(predictions, correct, data.label_set, BATCH)
    figures: dict[str, float | None]
    if isinstance(score, RegressionScore):
        figures = {name: getattr(score, name) for name in ("r2", "mean_absolute_error", "root_mean_squared_error")}
    elif isinstance(score, EntityScore):
        figures = {"entity_f1": score.value, "precision": score.precision, "recall": score.recall}
    else:
        predicted, labelled = ([int(number(answer)) for answer in each] for each in (predictions, correct))
        counts = statistics.count_by_label(predicted, labelled, data.label_set.multi_label)
        figures = {
            "accuracy": score.value,
            "balanced_accuracy": statistics.balanced_accuracy(counts, data.label_set.multi_label),
            "macro_f1": statistics.macro_f1(counts),
        }
    return {
        "data": data.name,
        "rows": len(predictions),
        **{name: round(value, 4) for name, value in figures.items() if value is not None},
    }


def summary(card: Mapping[str, Any]) -> str:
    """Returns a summary of the training and of the model's scores."""
    history, judged = card["training"], card["judged"]
    epochs = " → ".join(f"{value:.2%}" for value in history["held_out_accuracy"])
    if "r2" in judged:
        scores = (
            f"R² {judged['r2']:.2%}, mean absolute error {judged['mean_absolute_error']:.4g}, root mean squared error "
            f"{judged['root_mean_squared_error']:.4g}"
        )
    elif "entity_f1" in judged:
        scores = (
            f"entity F1 {judged['entity_f1']:.2%}, precision {judged['precision']:.2%}, recall {judged['recall']:.2%}"
        )
    else:
        scores = (
            f"accuracy {judged['accuracy']:.2%}, balanced {judged['balanced_accuracy']:.2%}, macro-F1 "
            f"{judged['macro_f1']:.4f}"
        )
    return (
        f"{history['score']} on {history['held_out_rows']} held-out rows: {epochs}; "
        f"best after epoch {history['best_epoch']}; "
        f"{history['steps']} steps in {history['precision']} on {history['device']}, {history['seconds']:.0f} s. "
        f"{judged['data']}, {judged['rows']} rows: {scores}"
    )
