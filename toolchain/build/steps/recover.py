"""Recover: trains a pruned model on the unpruned model's logits."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts.steps import Recover, settings_of
from toolchain.artifacts.store import copy_companions
from toolchain.backends.pytorch import describe, load_model, save_weights
from toolchain.build.job import Job, StepResult
from toolchain.data import encoding, inputs
from toolchain.data.inputs import Data
from toolchain.errors import ArtifactError
from toolchain.exits.choice import require_confidences
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.training.loop import Examples, Recipe, train

VERSION = 8


def recover(job: Job[Recover]) -> StepResult:
    """Distils the unpruned model into the parent, on training rows that are not held out and on pairs of these rows.

    The job's `resume` folder holds the training state until publication, so that the next run can continue after a
    killed run.

    Raises:
        GraphError: The step trains exits, and the parent does not classify texts.
        DataError: The training data is unusable, or the loss is not finite.
        ArtifactError: The job has no unpruned model.
    """
    step = job.step
    if job.root is None:
        raise ArtifactError("Recovery needs the unpruned model as its teacher.")
    if step.exits:
        require_confidences(job.parent_artifact)
    manifest = job.parent_artifact.manifest
    data = job.train.load(job.parent_artifact.label_set)
    encoder = encoding.Encoder.open(
        job.parent_artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length
    )
    job.progress(0, 1, "reading the training data")
    train_rows, held_out_rows = inputs.hold_out(data)
    train_examples = _examples(data, train_rows, encoder)
    # Besides the training rows, the step trains on pairs of rows: two random training rows joined to one input. The
    # more parameters pruning removed, the more pairs of rows the step uses: the model must relearn more, and a step of
    # training takes less time. If each training row has two texts, the step joins no rows.
    pairs = 0 if data.has_pairs else round(step.pairs * manifest.facts["pruning"]["achieved"] * len(train_examples.ids))
    mask = _mask_token(job.parent_artifact.path, encoder)
    augmented_examples = AugmentedExamples(
        train_examples.ids, train_examples.labels, pairs, mask, step.masked, step.seed, encoder.max_length
    )
    model, teacher = load_model(job.parent_artifact.path), load_model(job.root.path)
    recipe = Recipe(step.epochs, step.learning_rate, step.batch_size, step.seed, exits=step.exits or 0.0)
    key_fields = {"parent": manifest.id, "teacher": job.root.manifest.id, "step": settings_of(step), "version": VERSION}
    key = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()
    held_out_examples = _examples(data, held_out_rows, encoder)
    history = train(
        (model, teacher), (augmented_examples, held_out_examples), encoder, recipe, (job.resume, key), job.progress
    )
    copy_companions(job.parent_artifact, job.folder)
    save_weights(model.state_dict(), job.folder)
    recovery = {
        **history,
        "pairs": pairs,
        "masked": step.masked if mask is not None else 0.0,
        "teacher": job.root.manifest.id,
    }
    return StepResult.from_parent(job, {**describe(model, model.state_dict()), "recovery": recovery})


def _examples(data: Data, rows: list[int], encoder: encoding.Encoder) -> Examples:
    selection = data.select(rows)
    ids = encoder.encode(selection.texts)
    return Examples(ids, selection.targets(ids))


@dataclass(frozen=True)
class AugmentedExamples(Examples):
    """Training examples: the original rows and, in each epoch, new random pairs of rows with masked tokens.

    The teacher was trained on the original rows, so it is certain about nearly all of them. The teacher's logits for
    masked and longer texts contain more information than its logits for the original rows. Jiao et al. 2020,
    "TinyBERT", also distil on augmented data.

    Attributes:
        pairs: Number of pairs of rows in each epoch. A pair joins the texts of two rows and has the label of the second
            row.
        mask: Id of the mask token; None to mask no tokens in the pairs of rows.
        mask_share: Probability of masking a token in a pair of rows. The mask token replaces each masked token. The
            first and the last token of a pair of rows always stay unmasked.
        seed: Seed of the random choice of pairs of rows and of masked tokens.
        max_length: Largest number of tokens of a pair of rows.
    """

    pairs: int
    mask: int | None
    mask_share: float
    seed: int
    max_length: int

    def of_epoch(self, epoch: int) -> Examples:
        """Returns the original rows and the random pairs of rows for this epoch."""
        rng = random.Random(f"{self.seed} {epoch}")

        def mask_tokens(ids: list[int]) -> list[int]:
            return [token if self.mask is None or rng.random() >= self.mask_share else self.mask for token in ids]

        count = len(self.ids)
        row_pairs = [(rng.randrange(count), rng.randrange(count)) for _ in range(self.pairs)]
        # The first and the last token are special tokens of the tokenizer, which stay unmasked.
        pair_ids = [
            [first_ids[0], *mask_tokens([*first_ids[1:-1], *second_ids[1:-1]][: self.max_length - 2]), second_ids[-1]]
            for first_ids, second_ids in (
                (self.ids[first_row], self.ids[second_row]) for first_row, second_row in row_pairs
            )
        ]
        labels = [*self.labels, *(self.labels[second_row] for _, second_row in row_pairs)]
        return Examples([*self.ids, *pair_ids], labels)


def _mask_token(folder: Path, encoder: encoding.Encoder) -> int | None:
    """Returns the id of the mask token; None if the tokenizer has no mask token."""
    file = folder / "tokenizer_config.json"
    token = decode_object(read_bytes(file)).get("mask_token") if file.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    token_id: int | None = encoder.tokenizer.token_to_id(token) if isinstance(token, str) else None
    return token_id
