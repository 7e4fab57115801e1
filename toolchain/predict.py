"""Predict: label and probabilities for every text of a file, in order, in constant memory, resumable.

With an output file, what is scored is kept in parts beside it until the file is whole; the same command takes an
interrupted run up again.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts import publishing, store, variants
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place, open_session
from toolchain.bench.scenarios import offline_batches
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.files import FORMATS, STDIN, Row, Text, Texts, writer
from toolchain.data.inputs import Encoder, pad
from toolchain.data.labels import LabelSet, answers, shares
from toolchain.errors import ArtifactError, DataError
from toolchain.passes.probabilities import LOGITS
from toolchain.progress import Bar, Say
from toolchain.ship import shipping
from toolchain.ship.bundle_files.verify import BUNDLE, TEXT
from toolchain.ship.tokenizer_graph.session import TextSession
from toolchain.system import files, hardware

if TYPE_CHECKING:
    import numpy as np

PART = 2000  # texts scored, kept and shown at once
PLAIN = 32  # texts scored at once where they are typed or piped, and wanted soon
BATCH = 32


@dataclass(frozen=True)
class Model:
    """Where a model lies, which runtime opens it, what it answers; `id` tells it from every other. `files` are those of
    its folder, the one that lists them among them. With `texts`, its graph has the tokenizer in it."""

    path: Path
    runtime: str
    id: str
    labels: tuple[str, ...]
    encoder: Encoder
    files: tuple[str, ...]
    texts: bool = False

    @property
    def folder(self) -> Path:
        """Of the variant or bundle."""
        return self.encoder.folder

    def columns(self, texts: Texts) -> list[str]:
        """Of the predictions: the text or texts, the label, and every label's probability."""
        which = ["text", "text_pair"] if texts.pair else ["text"]
        return [*which, "prediction", *(f"score_{label}" for label in self.labels)]

    @property
    def label_set(self) -> LabelSet:
        """What it answers with."""
        return LabelSet(self.labels, self.encoder.multi_label)


# Gives the rows of so many texts at a time, in order, after so many that are done: (model, texts, done, window).
Engine = Callable[[Model, Texts, int, int], Iterator[list[Row]]]


def of_variant(workspace: Workspace, name: str, say: Say, bar: Bar) -> Model:
    """A variant, built if it is missing or stale."""
    return _of_artifact(ensure(workspace, [name], {}, say, bar)[name])


def _of_artifact(artifact: Artifact) -> Model:
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    runtime = variants.get(manifest.variant).runtime
    return Model(artifact.path, runtime, manifest.id, manifest.labels, encoder, artifact.files)


def of_bundle(folder: Path, say: Say) -> Model:
    """A bundle's first model; raises as `shipping.checked` does where it is not what it was."""
    body, _ = shipping.checked(folder)
    first = body["models"][0]
    if len(body["models"]) > 1:
        say(f"{folder}: {first['variant']}, the first of {len(body['models'])}")
    names = [spec["name"] for spec in first["inputs"]]
    encoder = Encoder.open(folder, names, body["max_length"])
    files = (*(entry["path"] for entry in body["files"]), BUNDLE)
    which = f"{body['id']}:{first['variant']}"
    return Model(folder / first["file"], "onnx", which, tuple(body["labels"]), encoder, files, names == [TEXT])


class Opened:
    """A model that is loaded, with so many `threads`: texts and their tokens in, logits out."""

    def __init__(self, model: Model, threads: int) -> None:
        self._encoder = model.encoder
        self._graph = TextSession(model.path, threads) if model.texts else None
        self._session = None if model.texts else open_session(model.path, model.runtime, Place("cpu", threads))

    def logits(self, texts: Sequence[Text], rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, labels]; `rows` are the tokens of the texts."""
        if self._graph:
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    "A bundle with the tokenizer in the graph takes single texts, no pairs.",
                    "Score them with the variant, or with a bundle shipped without --with-tokenizer.",
                )
            return self._graph.run([str(text) for text in texts])[LOGITS]
        assert self._session is not None
        return self._session.run(pad(rows, self._encoder.names, self._encoder.pad_id))

    def close(self) -> None:
        """Frees the model."""
        if self._graph:
            self._graph.close()
        if self._session:
            self._session.close()


def lying_in(folder: Path, say: Say) -> Model:
    """What a variant's or a bundle's folder holds, wherever it lies; raises `TamperedError` or `VerdictError` where it
    is not what it was."""
    if (folder / BUNDLE).exists():
        return of_bundle(folder, say)
    artifact = store.load(folder)
    if artifact is None:
        raise ArtifactError(f"{folder} holds no artifact.", "Name a variant, or the folder of a bundle.")
    artifact.verify()
    return _of_artifact(artifact)


def here(model: Model, texts: Texts, done: int, window: int) -> Iterator[list[Row]]:
    """The engine of this process alone."""
    opened = Opened(model, hardware.cores())
    for taken in windows(texts, done, window):
        yield scored(opened, model, texts, taken)
    opened.close()


def predict(model: Model, texts: Texts, output: Path | None, say: Say, bar: Bar, engine: Engine = here) -> int:
    """Scores every text; rows to `output` or standard output, in order. How many there were.

    Raises `DataError` for texts that cannot be read or an output of an unknown kind, `ArtifactError` where it exists or
    cannot be written; what was scored until then is kept for the next try.
    """
    if output is None:
        texts.count()
        count = 0
        with writer(None, model.columns(texts)) as write:
            for rows in engine(model, texts, 0, PLAIN):
                write(rows)
                count += len(rows)
        return count
    if output.suffix.lower() not in FORMATS:
        raise DataError(f"{output} ends in none of {', '.join(FORMATS)}.", "Name the output by one of them.")
    with publishing.lock(output, lambda: say(f"{output}: another run is writing it, waiting")):
        if output.exists():
            raise _taken(output)
        return _kept(model, texts, output, say, bar, engine)


def _taken(output: Path) -> ArtifactError:
    return ArtifactError(f"{output} exists.", "Move it away, or name another file.")


def _kept(model: Model, texts: Texts, output: Path, say: Say, bar: Bar, engine: Engine) -> int:
    """`predict` into a file, by way of parts."""
    parts = publishing.work_folder(output) / "parts"
    total = texts.count()
    done = _taken_up(parts, model, texts)
    if done:
        say(f"{output}: {done} texts are scored already")
    with bar("predict") as progress:
        for rows in engine(model, texts, done, PART):
            _keep(parts / f"{done:012}", rows)
            done += len(rows)
            if total:
                progress(done, total, "scoring")
    whole = parts / f"whole{output.suffix}"
    try:
        with writer(whole, model.columns(texts)) as write:
            for part in sorted(parts.glob("[0-9]*")):
                write([json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()])
        files.move_to_free(whole, output)
    except FileExistsError as error:
        raise _taken(output) from error
    except OSError as error:
        raise ArtifactError(f"{output} cannot be written: {error.strerror or error}.", "Free the space.") from error
    shutil.rmtree(parts, ignore_errors=True)
    return done


def _taken_up(parts: Path, model: Model, texts: Texts) -> int:
    """How many texts an earlier run of the same scored; what another left is thrown away."""
    about = {"model": model.id, "texts": texts.sha256, "column": texts.column, "pair": texts.pair}
    state = parts / "run.json"
    try:
        same = texts.file != STDIN and json.loads(state.read_text()) == about
    except (OSError, ValueError):  # none, or one that was being written when its run was killed
        same = False
    if same:
        scored = sorted(parts.glob("[0-9]*"))
        if scored:
            with scored[-1].open(encoding="utf-8") as last:
                return int(scored[-1].name) + sum(1 for _ in last)
        return 0
    shutil.rmtree(parts, ignore_errors=True)
    try:
        parts.mkdir(parents=True)
        state.write_text(json.dumps(about))
    except OSError as error:
        raise ArtifactError(f"{parts.parent} cannot be written: {error.strerror}.", "Name another file.") from error
    return 0


def _keep(part: Path, rows: Sequence[Row]) -> None:
    """Writes a part whole or not at all."""
    try:
        # \x85 and its like end a line for str.splitlines, and are escaped.
        files.write_whole(part, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise ArtifactError(
            f"{part.parent} cannot be written: {error.strerror or error}.",
            "Free the space; the same command goes on where it was.",
        ) from error


def windows(texts: Texts, done: int, window: int) -> Iterator[list[Text]]:
    """So many texts at a time, in order, after so many that are done."""
    rest = itertools.islice(texts.read(), done, None)
    while taken := list(itertools.islice(rest, window)):
        yield taken


def scored(opened: Opened, model: Model, texts: Texts, taken: Sequence[Text]) -> list[Row]:
    """The rows of a window, in order; batches are made of texts of like length."""
    columns, label_set = model.columns(texts), model.label_set
    encoded = model.encoder.encode(taken)
    scores: list[tuple[int, Sequence[float]]] = [(0, ())] * len(encoded)
    for batch in offline_batches([len(row) for row in encoded], BATCH):
        logits = opened.logits([taken[i] for i in batch], [encoded[i] for i in batch])
        given = zip(answers(logits, label_set.multi), shares(logits, label_set.multi), strict=True)
        for i, answer in zip(batch, given, strict=True):
            scores[i] = answer
    return [
        _row(columns, text, label_set.named(answer), chances)
        for text, (answer, chances) in zip(taken, scores, strict=True)
    ]


def _row(columns: Sequence[str], text: Text, label: str, chances: Sequence[float]) -> dict[str, Any]:
    asked = [text] if isinstance(text, str) else text
    return dict(zip(columns, [*asked, label, *(round(float(share), 6) for share in chances)], strict=True))
