"""A vocabulary and its table of words cut down to what a corpus needs; what that saves, and what it costs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.artifacts.store import Artifact, Manifest
from toolchain.artifacts.variants import Quantize
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession
from toolchain.build.job import Job
from toolchain.data import inputs
from toolchain.data.files import FORMATS, Texts
from toolchain.data.inputs import Data, Encoder, TrainingSource, pad
from toolchain.data.labels import answers
from toolchain.errors import DataError
from toolchain.models import vocabulary
from toolchain.passes import facts as facts_of
from toolchain.passes import read, rewrite
from toolchain.passes.model_shape import context_of, word_width
from toolchain.progress import Progress
from toolchain.system import hardware

TRAIN = "train"  # the corpus that is the training data without the rows held out


def corpus_of(spec: str | None, column: str | None) -> Texts | None:
    """The texts that `--trim-vocab` names, `column` being the one of a table; None for ``train`` and for no corpus.

    Raises `DataError` where there is no such file.
    """
    if spec is None or spec == TRAIN:
        return None
    if not Path(spec).is_file():
        raise DataError(f"There is no file {spec}.", f"Name a file of texts, or {TRAIN} for the training data.")
    return Texts(spec, column if Path(spec).suffix.lower() in FORMATS else None)


def kept(job: Job, step: Quantize) -> list[int]:
    """The ids of the parent's tokens that the step's corpus needs; see `vocabulary.kept_tokens`."""
    if step.trim_vocab != TRAIN:
        assert job.corpus is not None
        return vocabulary.kept_tokens(_encoder(job.given.path, job.given.manifest), job.corpus.read())
    data = job.train.load(job.given.label_set)
    texts = data.only(inputs.hold_out(data)[0]).texts
    return vocabulary.kept_tokens(_encoder(job.given.path, job.given.manifest), texts)


def trim(job: Job, tokens: Sequence[int], embedding: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Trims the tokenizer beside the graph in the job's folder, which is trimmed already, to `tokens`; the facts.

    `embedding` are the passes that quantised the tables, `facts` what is known of the graph. ``vocabulary`` says how
    many tokens were kept of how many, how many bytes that saves, and what rows held out of the training data are
    answered by the fp32 parent with all its tokens and by what was built: all rows, and those with a token that went.
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
    """Sentences of a trimmed artifact's domain: the rows held out of the training data it was made with, and for the
    embedded data its validation set, no phrase of which it was trimmed to. `DataError` where other data is given now.
    """
    manifest = artifact.manifest
    made_with = getattr(manifest.step, "train", None) or ""
    if made_with == TrainingSource().digest:
        return inputs.embedded()
    if made_with != train.digest:
        raise DataError(
            f"{manifest.variant} is validated on rows held out of {made_with.split(':')[0]}, and "
            f"{train.digest.split(':')[0]} is given now.",
            "Name that file with --train-data.",
        )
    data = train.load(artifact.label_set)
    return data.only(inputs.hold_out(data)[1])


def _encoder(folder: Path, manifest: Manifest) -> Encoder:
    return Encoder.open(folder, [spec.name for spec in manifest.inputs], manifest.max_length)


def _bytes(folder: Path) -> int:
    """Of the files that are no graph."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".onnx")


def _judged(job: Job, old: Encoder, tokens: frozenset[int]) -> dict[str, Any]:
    """``held_out`` and ``out_of_domain``: rows, right before and after, answers that changed."""
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
    """The label of every row, asked one by one: in fewer bits an answer can depend on the rest of its batch."""
    session = OrtSession(folder, Place("cpu", hardware.cores()))
    found: list[int] = []
    try:
        for done, row in enumerate(rows):
            progress(done, len(rows), what)
            found += answers(session.run(pad([row], encoder.names, encoder.pad_id)), encoder.multi_label)
    finally:
        session.close()
    return found


def sentence(facts: Mapping[str, Any]) -> str:
    """The vocabulary's facts in a sentence."""

    def said(part: Mapping[str, int]) -> str:
        if not part["rows"]:
            return "none"
        before, after = (part[key] / part["rows"] for key in ("right_before", "right_after"))
        return f"{part['rows']}, accuracy {before:.2%} → {after:.2%}, {part['flips']} answered otherwise"

    return (
        f"{facts['kept']:,} of {facts['of']:,} tokens kept, {facts['bytes_saved'] / 1e6:.1f} MB saved; against the "
        f"fp32 parent, held-out rows: {said(facts['held_out'])}; of these, with a token that went: "
        f"{said(facts['out_of_domain'])}"
    )
