"""Recover: trains a pruned model on the unpruned model's logits."""

from __future__ import annotations

import hashlib
import json

from toolchain.artifacts.steps import Recover, settings_of
from toolchain.artifacts.store import copy_companions
from toolchain.backends.pytorch import describe, load_model, save_weights
from toolchain.build.job import Job, StepResult
from toolchain.data import encoding, inputs
from toolchain.errors import ArtifactError
from toolchain.exits.choice import require_confidences
from toolchain.training.augmentation import AugmentedExamples, encode_rows, mask_token
from toolchain.training.loop import Recipe, train

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
    train_examples = encode_rows(data, train_rows, encoder)
    # Besides the training rows, the step trains on pairs of rows: two random training rows joined to one input. The
    # more parameters pruning removed, the more pairs of rows the step uses: the model must relearn more, and a step of
    # training takes less time. If each training row has two texts, the step joins no rows.
    pairs = 0 if data.has_pairs else round(step.pairs * manifest.facts["pruning"]["achieved"] * len(train_examples.ids))
    mask = mask_token(job.parent_artifact.path, encoder)
    augmented_examples = AugmentedExamples(
        train_examples.ids, train_examples.labels, pairs, mask, step.masked, step.seed, encoder.max_length
    )
    model, teacher = load_model(job.parent_artifact.path), load_model(job.root.path)
    recipe = Recipe(step.epochs, step.learning_rate, step.batch_size, step.seed, exits=step.exits or 0.0)
    key_fields = {"parent": manifest.id, "teacher": job.root.manifest.id, "step": settings_of(step), "version": VERSION}
    key = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()
    held_out_examples = encode_rows(data, held_out_rows, encoder)
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
