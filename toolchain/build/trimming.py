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
from toolchain.data.files import Texts
from toolchain.data.inputs import Data, TrainingSource
from toolchain.data.labels import Answer, Tokens, answers
from toolchain.data.tables import has_columns
from toolchain.errors import DataError
from toolchain.models import vocabulary
from toolchain.passes import facts as facts_of
from toolchain.passes import read, rewrite
from toolchain.passes.graph import array_of
from toolchain.passes.model_shape import context_of
from toolchain.passes.trim_vocabulary import word_table
from toolchain.progress import Progress
from toolchain.results.scores import score_answers, score_type
from toolchain.system import hardware

TRAIN = "train"  # `--trim-vocab train` means the training data without its held-out rows


def corpus_of(spec: str | None, column: str | None) -> Texts | None:
    """Returns the texts of the file or folder that the option `--trim-vocab` names; None if the option names no file.

    The option names no file if its value is ``train``, which means the training data. Without the option, the
    vocabulary is not trimmed.

    Args:
        spec: Value of the option `--trim-vocab`; None without the option.
        column: Column of the texts; ignored for a file of plain lines.

    Raises:
        DataError: The file does not exist.
    """
    if spec is None or spec == TRAIN:
        return None
    if not (Path(spec).is_file() or Path(spec).is_dir()):
        raise DataError(f"There is no file {spec}.", f"Name a file of texts, or {TRAIN} for the training data.")
    return Texts(spec, column if has_columns(spec) else None)


def tokens_to_keep(job: Job[Quantize]) -> list[int]:
    """Returns the ids of the parent's tokens to keep for the step's corpus; see `vocabulary.tokens_to_keep`."""
    if job.corpus and job.step.trim_vocab != TRAIN:
        return vocabulary.tokens_to_keep(
            _encoder(job.parent_artifact.path, job.parent_artifact.manifest), job.corpus.read()
        )
    data = job.train.load(job.parent_artifact.label_set)
    texts = data.select(inputs.hold_out(data)[0]).texts
    return vocabulary.tokens_to_keep(_encoder(job.parent_artifact.path, job.parent_artifact.manifest), texts)


def trim(
    job: Job[Quantize], tokens: Sequence[int], embedding: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Trims the tokenizer in the job's folder, whose graph is already trimmed, and measures the effect of trimming.

    Args:
        job: The job of the step.
        tokens: Ids of the tokens to keep.
        embedding: Names of the passes that quantised the embedding tables.
        facts: Facts about the trimmed graph.

    Returns:
        New facts for the manifest. If `facts` contains the number of parameters, the new fact ``parameters`` is this
        number without the parameters of the removed tokens. If `facts` does not contain the number of parameters, the
        result has no fact ``parameters``. The new fact ``vocabulary`` holds the number of tokens kept, the original
        number of tokens and the bytes saved. The fact ``vocabulary`` also compares the trimmed model with its untrimmed
        fp32 parent on held-out rows. The key ``held_out`` holds the comparison on all held-out rows. The key
        ``out_of_domain`` holds the comparison on the held-out rows with a removed token.
    """
    parent = job.parent_artifact
    bytes_before = _companion_bytes(job.folder)
    vocabulary.trim(job.folder, tokens)
    full_graph = read(parent.onnx_path)
    word_width = array_of(word_table(full_graph)).shape[1]
    full_graph, _ = rewrite(full_graph, embedding, context_of(parent.path))
    table_bytes_saved = facts_of(full_graph)["bytes_by_part"]["embeddings"] - facts["bytes_by_part"]["embeddings"]
    parent_encoder = _encoder(parent.path, parent.manifest)
    count = parent_encoder.tokenizer.get_vocab_size()
    vocabulary_facts: dict[str, Any] = {
        "kept": len(tokens),
        "of": count,
        "bytes_saved": table_bytes_saved + bytes_before - _companion_bytes(job.folder),
        **_compare_held_out(job, parent_encoder, frozenset(tokens)),
    }
    removed_parameters = (count - len(tokens)) * word_width
    parameter_facts = {"parameters": facts["parameters"] - removed_parameters} if "parameters" in facts else {}
    return {**parameter_facts, "vocabulary": vocabulary_facts}


def validation_data(train: TrainingSource, artifact: Artifact) -> Data:
    """Returns sentences of a trimmed artifact's domain: the held-out rows of its training data.

    For the embedded SST-2, the function returns the validation set instead of held-out rows. Nearly every token of
    SST-2's held-out rows also occurs in the other training rows, so trimming does not remove it.

    Args:
        train: The workspace's training data.
        artifact: The trimmed artifact.

    Raises:
        DataError: The step of the artifact used other training data than `train`.
    """
    manifest = artifact.manifest
    training_digest = getattr(manifest.step, "train", None) or ""
    if training_digest == TrainingSource().digest:
        return inputs.load_embedded()
    if training_digest != train.digest:
        raise DataError(
            f"The validation of {manifest.variant} needs held-out rows of {inputs.data_name(training_digest)}, but "
            f"this command uses {inputs.data_name(train.digest)}.",
            f"Name the training data of {manifest.variant} with --train-data.",
        )
    data = train.load(artifact.label_set)
    return data.select(inputs.hold_out(data)[1])


def _encoder(folder: Path, manifest: Manifest) -> Encoder:
    return Encoder.open(folder, [spec.name for spec in manifest.inputs], manifest.max_length)


def _companion_bytes(folder: Path) -> int:
    """Returns the total size of the folder's files except the graph."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".onnx")


def _compare_held_out(job: Job[Quantize], parent_encoder: Encoder, tokens: frozenset[int]) -> dict[str, Any]:
    """Counts rows, flips and right answers, for all held-out rows and for those with a removed token.

    For regression and token classification, the model's score replaces the numbers of flips and right answers.
    """
    label_set = job.parent_artifact.label_set
    data: Data = job.train.load(label_set)
    held_out = data.select(inputs.hold_out(data)[1])
    trimmed_encoder = _encoder(job.folder, job.parent_artifact.manifest)
    parent_tokens = parent_encoder.encode(held_out.texts)
    parent_answers = _compute_answers(
        job.parent_artifact.path, parent_encoder, parent_tokens, job.progress, "running the parent"
    )
    trimmed_answers = _compute_answers(
        job.folder, trimmed_encoder, trimmed_encoder.encode(held_out.texts), job.progress, "running the trimmed model"
    )
    all_rows = range(len(parent_tokens))
    out_of_domain_rows = [row for row in all_rows if not tokens.issuperset(parent_tokens[row])]

    def count_answers(rows: Sequence[int]) -> dict[str, Any]:
        if not label_set.labels_texts:
            scores = {
                name: score_answers([found[row] for row in rows], [held_out.labels[row] for row in rows], label_set)
                for name, found in (("before", parent_answers), ("after", trimmed_answers))
                if rows
            }
            return {
                "rows": len(rows),
                "score": score_type(label_set).name,
                **{n: score.value for n, score in scores.items()},
            }
        return {
            "rows": len(rows),
            "right_before": sum(parent_answers[row] == held_out.labels[row] for row in rows),
            "right_after": sum(trimmed_answers[row] == held_out.labels[row] for row in rows),
            "flips": sum(parent_answers[row] != trimmed_answers[row] for row in rows),
        }

    return {"held_out": count_answers(all_rows), "out_of_domain": count_answers(out_of_domain_rows)}


def _compute_answers(
    folder: Path, encoder: Encoder, rows: Sequence[Tokens], progress: Progress, activity: str
) -> list[Answer]:
    """Returns the answer to each row at batch 1.

    In a larger batch, the answer of a quantised model to one row can depend on the other rows.
    """
    session = OrtSession(folder, Place("cpu", hardware.cores()))
    row_answers: list[Answer] = []
    try:
        for count, row in enumerate(rows):
            progress(count, len(rows), activity)
            row_answers += answers(session.run(pad([row], encoder.names, encoder.pad_id)), encoder.task, [row])
    finally:
        session.close()
    return row_answers
