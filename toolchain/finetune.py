"""Fine-tune: a base model and labelled texts to a checkpoint folder that every command takes with `--model`."""

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
from toolchain.artifacts.variants import Import
from toolchain.build.job import Job
from toolchain.build.steps.importing import import_checkpoint
from toolchain.data import inputs, labels
from toolchain.data.datasets import Labelled
from toolchain.data.inputs import Data, Encoder, TrainingSource
from toolchain.data.labels import MULTI, SINGLE, LabelSet
from toolchain.errors import ArtifactError, CheckpointError, DataError
from toolchain.models import checkpoints
from toolchain.models.checkpoints import Source
from toolchain.progress import Bar, Say
from toolchain.results import statistics
from toolchain.training.batches import batches
from toolchain.training.loop import Examples, Recipe, train
from toolchain.training.scoring import BATCH, answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = checkpoints.CARD
SHARED = 0.5  # of the loss is the teacher's, where there is one
_MEND = "Move it away, or name another folder with --output."


@dataclass(frozen=True)
class Request:
    """What is trained: a `base` (folder, hub id or `reference`) on `train`; `labels` are those of a new head, in order,
    where they are not the base's or the data's own; `max_length` the most tokens of a text that are learnt from. What
    comes of it is judged once on `data` (None: the embedded validation set where that is what was trained on, else the
    rows held out).
    """

    base: str
    train: TrainingSource
    recipe: Recipe
    output: Path
    revision: str | None = None
    teacher: str | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    max_length: int | None = None
    data: str | None = None


def finetune(request: Request, say: Say, bar: Bar) -> dict[str, Any]:
    """Trains the checkpoint, writes it to the request's output and returns what its card says.

    A run that was stopped is taken up where it was. Raises `CheckpointError` for a base or teacher that does not do,
    `DataError` for training data that does not, `ArtifactError` where the output exists and is not what would be
    written.
    """
    base = checkpoints.locate(request.base)
    folder, base = checkpoints.fetch(base, request.revision, head=False)
    table = request.train.read()
    _check_texts(table)
    given = _label_set(folder)
    label_set, keep = _labels(request, table, given)
    rows = inputs.labelled(table, label_set)
    say(_counted(rows, given if keep else None))
    embedded = request.train.file is None
    known = inputs.load(request.data, label_set, request.train.columns) if request.data or embedded else None
    teacher = _teacher(request.teacher, label_set)
    about = {
        "base": {**asdict(base), "ref": Path(base.ref).name if base.kind == "folder" else base.ref},
        "train": request.train.digest,
        "labels": list(label_set.names),
        "multi_label": label_set.multi,
        "max_length": request.max_length,
        "teacher": teacher[1].revision if teacher else None,
        "recipe": asdict(request.recipe),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    output = request.output
    with publishing.lock(output, lambda: say(f"{output}: another run is writing it, waiting")):
        if done := _made(output, key):
            say(f"{output}: the same already, unchanged")
            return done
        resume = publishing.work_folder(output) / "training"
        with publishing.building(output) as scratch:
            start = scratch / "start"
            _begin(folder, start, label_set, keep, request.recipe.seed)
            encoder = _import(start, scratch, resume, request.max_length)
            shutil.rmtree(start)
            model, history = _trained(
                scratch, encoder, rows, (teacher and teacher[0], request.recipe), (resume, key), bar
            )
            judged = _judged(model, encoder, known or rows.only(inputs.hold_out(rows)[1]))
            card = {"toolchain": toolchain.__version__, "key": key, **about, "training": history, "judged": judged}
            (scratch / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            publishing.replace(scratch, output)
        shutil.rmtree(resume, ignore_errors=True)
    return card


def _check_texts(table: Labelled) -> None:
    """Raises `DataError` where a text is empty: there is nothing to learn from it."""
    empty = [
        number
        for number, text in enumerate(table.texts, start=1)
        if not all(part.strip() for part in ([text] if isinstance(text, str) else text))
    ]
    if empty:
        raise DataError(
            f"{table.column.where}: {len(empty)} rows have an empty text, the first is row {empty[0]}.",
            "Fill them or take them out.",
        )


def _label_set(folder: Path) -> LabelSet | None:
    """What a base that is a classifier already answers with; None for one that has no head."""
    config = checkpoints.config_of(folder)
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        return None
    return checkpoints.label_set(folder, config)


def _labels(request: Request, table: Labelled, given: LabelSet | None) -> tuple[LabelSet, bool]:
    """What the model is to answer with, and whether the base's head answers so already: it goes on being trained.

    A base that knows none of the data's labels gets a new head; of one that knows some the others may be misspelt, so
    that is left to the user. Raises `DataError`.
    """
    found = labels.label_set(table.column, request.labels, request.multi_label)
    if request.labels or given is None:
        found.indices(table.column)  # a label that was not named is told before anything is built
        return found, found == given
    try:
        given.indices(table.column)
    except DataError:
        known = {name.casefold() for name in given.names} & {name.casefold() for name in found.names}
        if known or (found.generic and not given.generic):
            raise DataError(
                f"{request.base} answers with {', '.join(given.names)}; {table.column.where} has "
                f"{', '.join(found.names)}.",
                f"Correct the data, or name the labels of a new head: --labels {','.join(found.names)}",
            ) from None
        return found, False
    return given, True


def _counted(rows: Data, kept: LabelSet | None) -> str:
    """How many texts have which label."""
    names = rows.label_set.names
    if rows.label_set.multi:
        counts = Counter(
            name for answer in rows.labels for name in rows.label_set.named(answer).split(labels.SEPARATOR)
        )
    else:
        counts = Counter(names[answer] for answer in rows.labels)
    told = ", ".join(f"{index} {name} ({counts[name]})" for index, name in enumerate(names))
    kind = "any number of labels a text" if rows.label_set.multi else "one label a text"
    head = "the base's head is trained further" if kept else "a new head"
    return f"{rows.name}: {len(rows.labels)} rows, {kind}: {told}; {head}"


def _teacher(name: str | None, label_set: LabelSet) -> tuple[Path, Source] | None:
    """The teacher's folder; `CheckpointError` where it answers with other labels."""
    if name is None:
        return None
    folder, source = checkpoints.fetch(checkpoints.locate(name))
    its = checkpoints.label_set(folder, checkpoints.config_of(folder))
    if its != label_set:
        raise CheckpointError(
            f"The teacher {name} answers with {', '.join(its.names)}, the model is to answer with "
            f"{', '.join(label_set.names)}.",
            "Use a teacher of the same labels in the same order; --labels states them.",
        )
    return folder, source


def _made(output: Path, key: str) -> dict[str, Any] | None:
    """The card of an output that is what would be written, None where nothing is there; `ArtifactError` else."""
    if not (output.exists() or output.is_symlink()):
        return None
    try:
        card: dict[str, Any] = json.loads((output / CARD).read_text(encoding="utf-8"))
        if card["key"] == key:
            return card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{output} exists and was not written by finetune.", _MEND) from error
    raise ArtifactError(f"{output} exists and was trained otherwise.", _MEND)


def _begin(folder: Path, start: Path, label_set: LabelSet, keep: bool, seed: int) -> None:
    """Writes the base with the head it is to have, and its tokenizer, to `start`."""
    import torch

    from toolchain.backends.pytorch import load_base

    torch.manual_seed(seed)
    model = load_base(folder, label_set.names, MULTI if label_set.multi else SINGLE, keep)
    model.save_pretrained(start, safe_serialization=True, max_shard_size="1TB")
    for name in checkpoints.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, start / name)


def _import(start: Path, scratch: Path, resume: Path, max_length: int | None) -> Encoder:
    """What an import makes of `start`, in `scratch`, all its checks done; and its encoder, for texts so long."""
    job = Job(Import(), None, start, scratch, None, TrainingSource(), resume, resume, lambda *_: None)
    built = import_checkpoint(job)
    if max_length and max_length > built.max_length:
        raise DataError(
            f"The base takes {built.max_length} tokens at most, not {max_length}.", "Choose a smaller --max-length."
        )
    return Encoder.open(scratch, [spec.name for spec in built.inputs], max_length or built.max_length)


def _trained(
    scratch: Path,
    encoder: Encoder,
    rows: Data,
    how: tuple[Path | None, Recipe],
    resume: tuple[Path, str],
    bar: Bar,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Trains what lies in `scratch` and puts the trained weights in its place; the model and its history."""
    from toolchain.backends.pytorch import check_stored, load_model, save_weights

    model = load_model(scratch)
    teacher = _same_tokens(how[0], encoder) if how[0] else None
    trained, held_out = (rows.only(part) for part in inputs.hold_out(rows))
    with bar("finetune") as progress:
        progress(0, 1, "reading the training data")
        both = tuple(Examples(encoder.encode(part.texts), part.targets) for part in (trained, held_out))
        history = train((model, teacher), (both[0], both[1]), encoder, how[1], resume, progress)
    save_weights(model.state_dict(), scratch)
    check_stored(model, scratch, encoder.names)
    return model, history


def _same_tokens(folder: Path, encoder: Encoder) -> PreTrainedModel:
    """The teacher; `CheckpointError` where its tokens are others than the student's, which it is asked in."""
    from toolchain.backends.pytorch import load_model

    its = Encoder.open(folder, encoder.names, encoder.max_length)
    if its.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
        raise CheckpointError(
            "The teacher's tokens are others than the base's.", "Use a teacher with the base's vocabulary."
        )
    return load_model(folder)


def _judged(model: PreTrainedModel, encoder: Encoder, data: Data) -> dict[str, Any]:
    """How the model answers `data`: rows, accuracy, balanced accuracy and macro-F1; of sets of labels, all of a set
    must be right for the accuracy."""
    multi = data.label_set.multi
    given = [0] * len(data.labels)
    for row, answer in answers(model, batches(encoder.encode(data.texts), data.targets, encoder, BATCH), multi):
        given[row] = answer
    counts = statistics.by_label(given, data.labels, multi)
    right = sum(one == other for one, other in zip(given, data.labels, strict=True))
    figures = {
        "accuracy": right / len(given),
        "balanced_accuracy": statistics.balanced_accuracy(counts, multi),
        "macro_f1": statistics.macro_f1(counts),
    }
    return {
        "data": data.name,
        "rows": len(given),
        **{name: round(value, 4) for name, value in figures.items() if value is not None},
    }


def sentence(card: Mapping[str, Any]) -> str:
    """How the training went and how its model answers, in a sentence."""
    history, found = card["training"], card["judged"]
    course = " → ".join(f"{value:.2%}" for value in history["held_out_accuracy"])
    return (
        f"accuracy on {history['held_out_rows']} held-out rows {course}, best after epoch {history['best_epoch']}; "
        f"{history['steps']} steps in {history['precision']} on {history['device']}, {history['seconds']:.0f} s. "
        f"{found['data']}, {found['rows']} rows: accuracy {found['accuracy']:.2%}, balanced "
        f"{found['balanced_accuracy']:.2%}, macro-F1 {found['macro_f1']:.4f}"
    )
