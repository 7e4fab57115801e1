"""Predicts the label and the probabilities of every text of a file, in order and in constant memory.

If the output is a file, the run stores finished predictions as part files in a work folder beside the output file. At
the end, the run joins the part files into the output file. After an interruption, the same command resumes the run.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.artifacts import publishing, store, variants
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place, open_session
from toolchain.bench.scenarios import offline_batches
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import Encoder, pad
from toolchain.data.entities import describe_entities
from toolchain.data.files import STDIN, Text, Texts, group_texts
from toolchain.data.labels import REGRESSION, TOKENS, Answer, LabelSet, Tokens, answers, label_probabilities, number
from toolchain.data.tables import FORMATS
from toolchain.data.writing import Row, open_writer
from toolchain.errors import ArtifactError, DataError
from toolchain.progress import Bar, Say
from toolchain.ship import checking
from toolchain.ship.bundle_files.verify import BUNDLE
from toolchain.ship.bundle_record import BundleRecord
from toolchain.ship.process import SCORED_ROWS, BundleModel
from toolchain.system import files, hardware

if TYPE_CHECKING:
    import numpy as np

# The run scores the texts of one window at a time. A window is a list of consecutive texts.
PART_TEXTS = 2000  # Largest number of texts in a window if the output is a file; each window becomes a part file.
STDOUT_WINDOW = 32  # Largest number of texts in a window if the output is standard output.
WINDOW_CHARACTERS = 1 << 22  # Largest number of characters in a window; a longer text has its own window.
BATCH_SIZE = SCORED_ROWS


@dataclass(frozen=True)
class Model:
    """A model file with its tokenizer and labels.

    Attributes:
        path: Path that the runtime opens: the folder of a variant, or the model file of a bundle.
        runtime: Name of the runtime.
        id: Unique id: a variant's manifest id, or a bundle's id with the name of the variant.
        labels: Names of the labels, by index.
        task: Task of the model, one of `toolchain.data.labels.TASKS`.
        folder: Folder of the variant or bundle.
        files: Relative paths of all files in `folder`, with the manifest or bundle.json.
        encoder: The tokenizer of a variant; None for a bundle, because only a child process opens its tokenizer.
        bundle: The record of a bundle; None for a variant.
    """

    path: Path
    runtime: str
    id: str
    labels: tuple[str, ...]
    task: str
    folder: Path
    files: tuple[str, ...]
    encoder: Encoder | None = None
    bundle: BundleRecord | None = None

    def columns(self, takes_texts: Texts) -> list[str]:
        """Returns the column names of the predictions: a text or a pair of texts, the label, and all probabilities.

        For regression, the column ``score`` follows the texts; for token classification, the column ``entities``.
        """
        text_columns = ["text", "text_pair"] if takes_texts.pair else ["text"]
        return [*text_columns, *self.answer_columns]

    @property
    def answer_columns(self) -> list[str]:
        """Returns the column names of the predictions without the texts."""
        if self.label_set.task == REGRESSION:
            return ["score"]
        if self.label_set.task == TOKENS:
            return ["entities"]
        return ["prediction", *(f"score_{label}" for label in self.labels)]

    @property
    def label_set(self) -> LabelSet:
        """Returns the labels of the model."""
        return LabelSet(self.labels, self.task)


# An `Engine` is a function that is called with (model, texts, skip, window). An `Engine` skips the first `skip` texts,
# and yields the predictions of one window at a time, in order; see `split_windows`.
Engine = Callable[[Model, Texts, int, int], Iterator[list[Row]]]


def load_variant_model(workspace: Workspace, name: str, say: Say, bar: Bar) -> Model:
    """Returns the model of a variant; builds the variant if it is missing or stale."""
    return _model_from_artifact(ensure(workspace, [name], {}, say, bar)[name])


def _model_from_artifact(artifact: Artifact) -> Model:
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    runtime = variants.get(manifest.variant).runtime
    path = artifact.path
    return Model(path, runtime, manifest.id, manifest.labels, encoder.task, path, artifact.files, encoder)


def load_bundle_model(folder: Path, say: Say) -> Model:
    """Returns the first model of a bundle, after the checks of `checking.check_bundle`.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, or this runtime does not reproduce the logits recorded in the bundle.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    record, _ = checking.check_bundle(folder)
    first_model = record.models[0]
    if len(record.models) > 1:
        say(f"{folder}: using {first_model.variant}, the first of {len(record.models)} models")
    files = (*(entry.path for entry in record.files), BUNDLE)
    model_id, path = f"{record.id}:{first_model.variant}", folder / first_model.file
    return Model(path, "onnx", model_id, record.labels, record.task_name, folder, files, bundle=record)


class LoadedModel(Protocol):
    """A loaded model that runs on the CPU and returns logits."""

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Returns the token ids of each text or pair, with special tokens."""

    def logits(self, texts: Sequence[Text], rows: Sequence[Tokens]) -> np.ndarray:
        """Returns the logits of the texts as float32, of shape [texts, labels], or [texts, tokens, labels] for token
        classification.

        Args:
            texts: The texts, for a graph that contains the tokenizer.
            rows: Result of `encode` for the texts, for a graph without the tokenizer.

        Raises:
            DataError: The graph contains the tokenizer, and an item of `texts` is a pair of texts.
        """

    def close(self) -> None:
        """Releases the model."""


class _LoadedVariant:
    """The loaded model of a variant; see `LoadedModel`."""

    def __init__(self, model: Model, encoder: Encoder, threads: int) -> None:
        self._encoder = encoder
        self._labels = len(model.labels)
        self._session = open_session(model.path, model.runtime, Place("cpu", threads))

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        return self._encoder.encode(texts)

    def logits(self, texts: Sequence[Text], rows: Sequence[Tokens]) -> np.ndarray:
        logits = self._session.run(pad(rows, self._encoder.names, self._encoder.pad_id))
        if logits.shape[-1] != self._labels:
            raise ArtifactError(
                f"The model in {self._encoder.folder} gives {logits.shape[-1]} logits, but its manifest has "
                f"{self._labels} labels.",
                "Do not use this artifact; build it again.",
            )
        return logits

    def close(self) -> None:
        self._session.close()


def load_model(model: Model, threads: int) -> LoadedModel:
    """Loads a model with `threads` threads; the model of a bundle runs in a child process with limits."""
    if model.bundle:
        return BundleModel(model.folder, model.bundle, threads)
    assert model.encoder is not None
    return _LoadedVariant(model, model.encoder, threads)


def load_folder_model(folder: Path, say: Say) -> Model:
    """Returns the model in the folder of a variant or of a bundle, after a check of its files.

    Raises:
        ArtifactError: The folder holds neither an artifact nor a bundle.
        TamperedError: The files of the variant do not match their digests.
        VerdictError: The bundle was modified, or this runtime does not reproduce the logits recorded in the bundle.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    if (folder / BUNDLE).exists():
        return load_bundle_model(folder, say)
    artifact = store.load(folder)
    if artifact is None:
        raise ArtifactError(f"{folder} is not the folder of an artifact.", "Name a variant, or the folder of a bundle.")
    artifact.verify()
    return _model_from_artifact(artifact)


def score_locally(model: Model, texts: Texts, skip: int, window: int) -> Iterator[list[Row]]:
    """Scores texts on this machine; yields the predictions of each window; the default `Engine`."""
    with closing(load_model(model, hardware.cores())) as loaded_model:
        for window_texts in split_windows(texts, skip, window):
            yield score_window(loaded_model, model, texts, window_texts)


def predict(
    model: Model,
    texts: Texts,
    output: Path | None,
    say: Say,
    bar: Bar,
    engine: Engine = score_locally,
    escape_formulas: bool = False,
) -> int:
    """Scores every text and writes the predictions in order.

    After an error, the next run with the same output file reuses the finished predictions.

    Args:
        output: Output file; None for standard output.
        engine: Function that computes the predictions.
        escape_formulas: Whether texts and labels in `output` are protected against spreadsheets; see `open_writer`.

    Returns:
        Number of texts.

    Raises:
        DataError: The texts are unreadable, or the suffix of `output` is not in `FORMATS`.
        ArtifactError: `output` exists or cannot be written.
    """
    if output is None:
        texts.count()
        count = 0
        with open_writer(None, model.columns(texts)) as write:
            for rows in engine(model, texts, 0, STDOUT_WINDOW):
                write(rows)
                count += len(rows)
        return count
    if output.suffix.lower() not in FORMATS:
        raise DataError(
            f"The ending of {output} is none of {', '.join(FORMATS)}.", "Choose an output file with a supported ending."
        )
    with publishing.lock(output, lambda: say(f"{output}: waiting, because another run is writing this file")):
        if output.exists():
            raise _output_exists_error(output)
        count = _score_to_parts(model, texts, output, say, bar, engine)
        _join_parts(model.columns(texts), output, escape_formulas)
        return count


def _output_exists_error(output: Path) -> ArtifactError:
    return ArtifactError(f"{output} exists.", "Move the existing file away, or choose another output file.")


def _parts_folder(output: Path) -> Path:
    return publishing.work_folder(output) / "parts"


def _score_to_parts(model: Model, texts: Texts, output: Path, say: Say, bar: Bar, engine: Engine) -> int:
    """Scores the texts, writes one part file for each window, and returns the number of texts."""
    parts = _parts_folder(output)
    total = texts.count()
    count = _resume_parts(parts, model, texts)
    if count:
        say(f"{output}: {count} texts are already scored")
    with bar("predict") as progress:
        for rows in engine(model, texts, count, PART_TEXTS):
            _write_part(parts / f"{count:012}", rows)
            count += len(rows)
            if total:
                progress(count, total, "scoring")
    return count


def _join_parts(columns: Sequence[str], output: Path, escape_formulas: bool) -> None:
    """Joins the part files into the output file, and deletes the part files."""
    parts = _parts_folder(output)
    joined_file = parts / f"whole{output.suffix}"
    try:
        with open_writer(joined_file, columns, escape_formulas) as write:
            for part in sorted(parts.glob("[0-9]*")):
                write([json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()])
        files.flush(joined_file)
        files.move_to_free(joined_file, output)
    except FileExistsError as error:
        raise _output_exists_error(output) from error
    except OSError as error:
        raise ArtifactError(f"{output} cannot be written: {error.strerror or error}.", "Free space.") from error
    shutil.rmtree(parts, ignore_errors=True)


def _resume_parts(parts: Path, model: Model, texts: Texts) -> int:
    """Returns how many texts an interrupted run with the same inputs has scored; deletes part files of other runs."""
    run_settings = {"model": model.id, "texts": texts.sha256, "column": texts.column, "pair": texts.pair}
    state = parts / "run.json"
    try:
        is_same_run = texts.file != STDIN and json.loads(state.read_text()) == run_settings
    except (OSError, ValueError):  # run.json is missing, or a killed run left it incomplete
        is_same_run = False
    if is_same_run:
        part_files = sorted(parts.glob("[0-9]*"))
        if part_files:
            with part_files[-1].open(encoding="utf-8") as last_part:
                return int(part_files[-1].name) + sum(1 for _ in last_part)
        return 0
    shutil.rmtree(parts, ignore_errors=True)
    try:
        parts.mkdir(parents=True)
        state.write_text(json.dumps(run_settings))
    except OSError as error:
        raise ArtifactError(f"{parts.parent} cannot be written: {error.strerror}.", "Choose another file.") from error
    return 0


def _write_part(part: Path, rows: Sequence[Row]) -> None:
    """Writes a part file atomically."""
    try:
        # str.splitlines also splits at characters such as \x85, but json.dumps escapes these characters.
        files.write_whole(part, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise ArtifactError(
            f"{part.parent} cannot be written: {error.strerror or error}.",
            "Free disk space, then run the same command again to continue the run.",
        ) from error


def split_windows(texts: Texts, skip: int, window: int) -> Iterator[list[Text]]:
    """Returns the texts after the first `skip` texts as windows, in order.

    A window has at most `window` texts and at most `WINDOW_CHARACTERS` characters; a longer text has its own window.
    """
    return group_texts(itertools.islice(texts.read(), skip, None), window, WINDOW_CHARACTERS)


@dataclass(frozen=True)
class Prediction:
    """The answer of a model to one text or pair of texts.

    Attributes:
        text: The text, or the pair of texts.
        label: The predicted label; for a multi-label model, all predicted labels, separated by ``|``. None for a
            regression model and for a token classifier.
        probabilities: Probability of each label, by name; empty for a regression model and for a token classifier.
        score: The score of a regression model; None for other models.
        entities: The entities that a token classifier finds, as `describe_entities` returns them; empty for other
            models.
    """

    text: Text
    label: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    entities: Sequence[Mapping[str, Any]] = ()


def predict_texts(loaded_model: LoadedModel, label_set: LabelSet, texts: Sequence[Text]) -> list[Prediction]:
    """Returns the predictions for texts, in order; each batch holds texts of similar length.

    Raises:
        DataError: The model finds entities, and an item of `texts` is a pair of texts.
    """
    if label_set.task == TOKENS and not all(isinstance(text, str) for text in texts):
        raise DataError("The model finds entities in single texts, not in pairs.", "Leave out --text-pair-column.")
    rows = loaded_model.encode(texts)
    predictions: dict[int, Prediction] = {}
    for batch in offline_batches([len(row) for row in rows], BATCH_SIZE):
        logits = loaded_model.logits([texts[i] for i in batch], [rows[i] for i in batch])
        probabilities = label_probabilities(logits, label_set.task)
        if label_set.task == TOKENS:
            for i, row in zip(batch, probabilities, strict=True):
                entities = describe_entities(_texts_of(texts[i])[0], rows[i].spans, row, label_set.names)
                predictions[i] = Prediction(texts[i], entities=entities)
            continue
        for i, answer, row in zip(batch, answers(logits, label_set.task), probabilities, strict=True):
            predictions[i] = _prediction(texts[i], label_set, answer, row)
    return [predictions[i] for i in range(len(texts))]


def _prediction(text: Text, label_set: LabelSet, answer: Answer, probabilities: Sequence[float]) -> Prediction:
    if label_set.task == REGRESSION:
        return Prediction(text, score=number(answer))
    shares = {label: float(share) for label, share in zip(label_set.names, probabilities, strict=True)}
    return Prediction(text, label_set.format_answer(answer), shares)


def score_window(loaded_model: LoadedModel, model: Model, texts: Texts, window_texts: Sequence[Text]) -> list[Row]:
    """Returns the rows of the predictions for the texts of one window, in order."""
    columns = model.columns(texts)
    return [
        dict(zip(columns, [*_texts_of(each.text), *answer_values(model.label_set, each)], strict=True))
        for each in predict_texts(loaded_model, model.label_set, window_texts)
    ]


def answer_values(label_set: LabelSet, prediction: Prediction) -> list[Any]:
    """Returns the values of `Model.answer_columns`: label and probabilities, score, or entities."""
    if label_set.task == TOKENS:
        return [prediction.entities]
    if prediction.score is not None:
        return [round(prediction.score, 6)]
    return [prediction.label, *(round(prediction.probabilities[label], 6) for label in label_set.names)]


def _texts_of(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text
