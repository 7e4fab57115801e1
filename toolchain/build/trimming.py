"""Vocabulary trimming during quantisation: its corpus, the bytes that it saves, and its effect on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import Quantize
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession
from toolchain.build.job import Job
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.files import FORMATS, Texts
from toolchain.data.inputs import Data, TrainingSource
from toolchain.data.labels import answers
from toolchain.errors import DataError
from toolchain.models import vocabulary
from toolchain.passes import facts as facts_of
from toolchain.passes import read, rewrite
from toolchain.passes.model_shape import context_of, word_width
from toolchain.progress import Progress
from toolchain.system import hardware

TRAIN = "train"  # value of the corpus that means the training data without its held-out rows


def corpus_of(spec: str | None, column: str | None) -> Texts | None:
    """Returns the texts that `--trim-vocab` names; None for ``train`` and for no corpus.

    Args:
        spec: Value of `--trim-vocab`; None for no trimming.
        column: Column of the texts; ignored for a file of plain lines.

    Raises:
        DataError: The file does not exist.
    """
    if spec is None or spec == TRAIN:
        return None
    if not Path(spec).is_file():
        raise DataError(f"There is no file {spec}.", f"Name a file of texts, or {TRAIN} for the training data.")
    return Texts(spec, column if Path(spec).suffix.lower() in FORMATS else None)


def tokens_to_keep(job: Job[Quantize]) -> list[int]:
    """Returns the ids of the parent's tokens to keep for the step's corpus; see `vocabulary.tokens_to_keep`."""
    if job.corpus and job.step.trim_vocab != TRAIN:
        return vocabulary.tokens_to_keep(_encoder(job.given.path, job.given.manifest), job.corpus.read())
    data = job.train.load(job.given.label_set)
    texts = data.only(inputs.hold_out(data)[0]).texts
    return vocabulary.tokens_to_keep(_encoder(job.given.path, job.given.manifest), texts)


def trim(
    job: Job[Quantize], tokens: Sequence[int], embedding: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Trims the tokenizer in the job's folder, whose graph is already trimmed, and measures the effect.

    Args:
        job: The job of the step.
        tokens: Ids of the tokens to keep.
        embedding: Names of the passes that quantised the embedding tables.
        facts: Facts about the trimmed graph.

    Returns:
        Facts for the manifest: ``vocabulary``, and ``parameters`` if `facts` has it. ``vocabulary`` holds the number of
        tokens kept, the original number and the bytes saved. It also compares the fp32 parent, with all its tokens,
        and the new model on held-out rows. ``held_out`` covers all these rows, ``out_of_domain`` covers those with a
        removed token.
    """
    given = job.given
    before = _bytes(job.folder)
    vocabulary.trim(job.folder, tokens)
    whole, _ = rewrite(read(given.onnx_path), embedding, context_of(given.path))
    tables = facts_of(whole)["bytes_by_part"]["embeddings"] - facts["bytes_by_part"]["embeddings"]
    old = _encoder(given.path, given.manifest)
    count = old.tokenizer.get_vocab_size()
    found: dict[str, Any] = {
        "kept": len(tokens),
        "of": count,
        "bytes_saved": tables + before - _bytes(job.folder),
        **_judged(job, old, frozenset(tokens)),
    }
    gone = (count - len(tokens)) * word_width(given.path)
    known = {"parameters": facts["parameters"] - gone} if "parameters" in facts else {}
    return {**known, "vocabulary": found}


def judged_by(train: TrainingSource, artifact: Artifact) -> Data:
    """Returns sentences of a trimmed artifact's domain: the held-out rows of its training data.

    For the embedded data it returns the validation set instead, whose phrases are not in the training rows.

    Args:
        train: The workspace's training data.
        artifact: The trimmed artifact.

    Raises:
        DataError: The step of the artifact used other training data than `train`.
    """
    manifest = artifact.manifest
    made_with = getattr(manifest.step, "train", None) or ""
    if made_with == TrainingSource().digest:
        return inputs.embedded()
    if made_with != train.digest:
        raise DataError(
            f"{manifest.variant} is validated on rows held out of {inputs.name_in(made_with)}, and "
            f"{inputs.name_in(train.digest)} is given now.",
            "Name that file with --train-data.",
        )
    data = train.load(artifact.label_set)
    return data.only(inputs.hold_out(data)[1])


def _encoder(folder: Path, manifest: Manifest) -> Encoder:
    return Encoder.open(folder, [spec.name for spec in manifest.inputs], manifest.max_length)


def _bytes(folder: Path) -> int:
    """Returns the total size of the folder's files except the graph."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".onnx")


def _judged(job: Job[Quantize], old: Encoder, tokens: frozenset[int]) -> dict[str, Any]:
    """Returns ``held_out`` and ``out_of_domain``: counts of rows, correct answers before and after, and flips."""
    data: Data = job.train.load(job.given.label_set)
    held = data.only(inputs.hold_out(data)[1])
    new = _encoder(job.folder, job.given.manifest)
    rows = old.encode(held.texts)
    first = _answers(job.given.path, old, rows, job.progress, "asking the parent")
    second = _answers(job.folder, new, new.encode(held.texts), job.progress, "asking with fewer tokens")
    everything = range(len(rows))
    beyond = [row for row in everything if not tokens.issuperset(rows[row])]

    def counted(chosen: Sequence[int]) -> dict[str, int]:
        return {
            "rows": len(chosen),
            "right_before": sum(first[row] == held.labels[row] for row in chosen),
            "right_after": sum(second[row] == held.labels[row] for row in chosen),
            "flips": sum(first[row] != second[row] for row in chosen),
        }

    return {"held_out": counted(everything), "out_of_domain": counted(beyond)}


def _answers(folder: Path, encoder: Encoder, rows: Sequence[Sequence[int]], progress: Progress, what: str) -> list[int]:
    """Returns the answer to each row at batch 1, because quantised answers can depend on other rows of a batch."""
    session = OrtSession(folder, Place("cpu", hardware.cores()))
    found: list[int] = []
    try:
        for done, row in enumerate(rows):
            progress(done, len(rows), what)
            found += answers(session.run(pad([row], encoder.names, encoder.pad_id)), encoder.multi_label)
    finally:
        session.close()
    return found
