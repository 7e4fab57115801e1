"""Recover: a pruned model trained to answer as the unpruned one does."""

from __future__ import annotations

import hashlib
import json

from toolchain import inputs
from toolchain.artifacts import copy_companions
from toolchain.backends.pytorch import describe, load_model, save_weights
from toolchain.errors import ArtifactError
from toolchain.inputs import Data
from toolchain.jobs import Built, Job
from toolchain.training import Examples, Recipe, train
from toolchain.variants import Recover, settings_of

VERSION = 1


def recover(job: Job) -> Built:
    """Distils the model's own unpruned self into the parent, on all rows but those held out.

    The embeddings stay as they are. What is needed to go on after a kill lies in the job's `resume` folder until the
    artifact is published. Raises `DataError` for training data that cannot be used.
    """
    step = job.step
    assert isinstance(step, Recover)
    if job.root is None:
        raise ArtifactError("Recovery needs the unpruned model as its teacher.")
    manifest = job.given.manifest
    data = job.train.load(manifest.labels)
    encoder = inputs.Encoder.open(job.given.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    job.progress(0, 1, "reading the training data")
    trained, held_out = inputs.hold_out(data)
    rows = _examples(data, trained, encoder, joined=True), _examples(data, held_out, encoder)
    model, teacher = load_model(job.given.path), load_model(job.root.path)
    base = model.base_model_prefix
    for name, parameter in model.named_parameters():
        # The table is most of the parameters, and most of the time of an optimiser's step.
        parameter.requires_grad_(not name.startswith(f"{base}.embeddings."))
    recipe = Recipe(step.epochs, step.learning_rate, step.batch_size, step.seed)
    sealed = {"parent": manifest.id, "teacher": job.root.manifest.id, "step": settings_of(step), "version": VERSION}
    key = hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
    history = train((model, teacher), rows, encoder, recipe, (job.resume, key), job.progress)
    copy_companions(job.given, job.folder)
    save_weights(model, job.folder)
    return Built.like(job, {**describe(model), "recovery": {**history, "teacher": job.root.manifest.id}})


def _examples(data: Data, rows: list[int], encoder: inputs.Encoder, joined: bool = False) -> Examples:
    """The rows; `joined`: and each once more in a pair with another, which is no row the teacher was trained on."""
    texts = [data.texts[row] for row in rows]
    labels = [data.labels[row] for row in rows]
    if joined:
        texts += [f"{data.texts[one]} {data.texts[other]}" for one, other in zip(rows[::2], rows[1::2], strict=False)]
        labels += [data.labels[row] for row in rows[1::2]]
    return Examples(encoder.encode(texts), labels)


def sentence(facts: dict[str, object]) -> str:
    """How the recovery went, in one sentence."""
    held = facts["held_out_accuracy"]
    assert isinstance(held, list)
    course = " → ".join(f"{value:.2%}" for value in held)
    return (
        f"accuracy on {facts['held_out_rows']} held-out rows {course}, best after epoch {facts['best_epoch']}; "
        f"{facts['steps']} steps in {facts['precision']} on {facts['device']}"
    )
