"""Prediction of the label and the probabilities of every text of a file, in order and in constant memory.

For an output file, the run stores finished rows as parts in a work folder beside it. It writes the output file at the
end. After an interruption, the same command resumes the run.
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
from toolchain.data.encoding import Encoder, pad
from toolchain.data.files import FORMATS, STDIN, Row, Text, Texts, writer
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

PART = 2000  # texts per part, if rows go to a file
PLAIN = 32  # texts per window, if rows go to standard output: small, so that rows appear soon
BATCH = 32


@dataclass(frozen=True)
class Model:
    """A model file with its tokenizer and labels.

    Attributes:
        path: Path that the runtime opens.
        runtime: Name of the runtime.
        id: Unique id: a variant's manifest id, or a bundle's id with the name of the variant.
        labels: Names of the labels, by index.
        encoder: The tokenizer.
        files: Files of the folder by their relative paths, with the manifest or bundle.json.
        texts: Whether the graph contains the tokenizer.
    """

    path: Path
    runtime: str
    id: str
    labels: tuple[str, ...]
    encoder: Encoder
    files: tuple[str, ...]
    texts: bool = False

    @property
    def folder(self) -> Path:
        """Returns the folder of the variant or bundle."""
        return self.encoder.folder

    def columns(self, texts: Texts) -> list[str]:
        """Returns the column names of the predictions: the text or texts, the label, and each label's probability."""
        which = ["text", "text_pair"] if texts.pair else ["text"]
        return [*which, "prediction", *(f"score_{label}" for label in self.labels)]

    @property
    def label_set(self) -> LabelSet:
        """Returns the labels of the model."""
        return LabelSet(self.labels, self.encoder.multi_label)


# Called as (model, texts, done, window): skips the first `done` texts, and yields the rows of `window` texts at a time,
# in order.
Engine = Callable[[Model, Texts, int, int], Iterator[list[Row]]]


def of_variant(workspace: Workspace, name: str, say: Say, bar: Bar) -> Model:
    """Returns the model of a variant; builds the variant if it is missing or stale."""
    return _of_artifact(ensure(workspace, [name], {}, say, bar)[name])


def _of_artifact(artifact: Artifact) -> Model:
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    runtime = variants.get(manifest.variant).runtime
    return Model(artifact.path, runtime, manifest.id, manifest.labels, encoder, artifact.files)


def of_bundle(folder: Path, say: Say) -> Model:
    """Returns the first model of a bundle, after the checks of `shipping.check_bundle`.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, or this runtime cannot compute its recorded logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    body, _ = shipping.check_bundle(folder)
    first = body["models"][0]
    if len(body["models"]) > 1:
        say(f"{folder}: {first['variant']}, the first of {len(body['models'])}")
    names = [spec["name"] for spec in first["inputs"]]
    encoder = Encoder.open(folder, names, body["max_length"])
    files = (*(entry["path"] for entry in body["files"]), BUNDLE)
    which = f"{body['id']}:{first['variant']}"
    return Model(folder / first["file"], "onnx", which, tuple(body["labels"]), encoder, files, names == [TEXT])


class Opened:
    """A loaded model that runs on the CPU with a number of threads and returns logits."""

    def __init__(self, model: Model, threads: int) -> None:
        self._encoder = model.encoder
        self._graph = TextSession(model.path, threads) if model.texts else None
        self._session = None if model.texts else open_session(model.path, model.runtime, Place("cpu", threads))

    def logits(self, texts: Sequence[Text], rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the logits of the texts, float32 [texts, labels].

        Args:
            texts: The texts, for a graph that contains the tokenizer.
            rows: Token ids of each text, for all other models.

        Raises:
            DataError: The graph contains the tokenizer and a text is a pair.
        """
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
        """Releases the model."""
        if self._graph:
            self._graph.close()
        if self._session:
            self._session.close()


def lying_in(folder: Path, say: Say) -> Model:
    """Returns the model in the folder of a variant or of a bundle, after a check of its files.

    Raises:
        ArtifactError: The folder holds neither an artifact nor a bundle.
        TamperedError: The files of the variant do not match their digests.
        VerdictError: The bundle was modified, or this runtime cannot compute its recorded logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    if (folder / BUNDLE).exists():
        return of_bundle(folder, say)
    artifact = store.load(folder)
    if artifact is None:
        raise ArtifactError(f"{folder} holds no artifact.", "Name a variant, or the folder of a bundle.")
    artifact.verify()
    return _of_artifact(artifact)


def here(model: Model, texts: Texts, done: int, window: int) -> Iterator[list[Row]]:
    """Yields the rows of each window, computed in this process: the default `Engine`."""
    opened = Opened(model, hardware.cores())
    for taken in windows(texts, done, window):
        yield scored(opened, model, texts, taken)
    opened.close()


def predict(model: Model, texts: Texts, output: Path | None, say: Say, bar: Bar, engine: Engine = here) -> int:
    """Scores every text and writes the rows in order. Rows that are done before an error stay for the next run.

    Args:
        output: Output file; None for standard output.
        engine: Function that computes the rows.

    Returns:
        Number of texts.

    Raises:
        DataError: The texts are unreadable, or the suffix of `output` is not in `FORMATS`.
        ArtifactError: `output` exists or cannot be written.
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
    """Scores the texts part by part, then joins the parts into the output file."""
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
    """Returns the number of texts that an interrupted equal run scored; deletes the parts of other runs."""
    about = {"model": model.id, "texts": texts.sha256, "column": texts.column, "pair": texts.pair}
    state = parts / "run.json"
    try:
        same = texts.file != STDIN and json.loads(state.read_text()) == about
    except (OSError, ValueError):  # missing, or incomplete because its run was killed
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
    """Writes a part atomically."""
    try:
        # str.splitlines also splits at characters such as \x85. json.dumps escapes them.
        files.write_whole(part, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise ArtifactError(
            f"{part.parent} cannot be written: {error.strerror or error}.",
            "Free the space; the same command goes on where it was.",
        ) from error


def windows(texts: Texts, done: int, window: int) -> Iterator[list[Text]]:
    """Yields lists of at most `window` texts, in order, without the first `done` texts."""
    rest = itertools.islice(texts.read(), done, None)
    while taken := list(itertools.islice(rest, window)):
        yield taken


def scored(opened: Opened, model: Model, texts: Texts, taken: Sequence[Text]) -> list[Row]:
    """Returns the rows of the texts of one window, in order; each batch holds texts of similar length."""
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
