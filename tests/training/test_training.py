"""Tests of training: the student learns, the best weights are kept, and a killed run resumes with the same result."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_short_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.artifacts import publishing
from toolchain.artifacts.steps import Prune, Recover
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import Encoder
from toolchain.data.labels import LabelSet
from toolchain.errors import CheckpointError, DataError
from toolchain.models import architectures
from toolchain.pruning.setup import shared_setup
from toolchain.training import loop, losses
from toolchain.training.augmentation import AugmentedExamples, mask_token
from toolchain.training.batches import Batch, batch
from toolchain.training.exit_heads import ExitHeads
from toolchain.training.loop import Examples, Recipe, train

RECIPE = Recipe(epochs=2, learning_rate=2e-3, batch_size=8)


@pytest.fixture(scope="module")
def task(built_tiny, tmp_path_factory):
    """Returns the tiny model as a teacher, training rows, held-out rows, the `Encoder`, and the file of all rows."""
    file = write_short_rows(tmp_path_factory.mktemp("train") / "train.csv", 120)
    source = training_source(file)
    setup = shared_setup(built_tiny.load("torch-fp32"), source, 100, 20)
    data = source.load(LabelSet(("NEGATIVE", "POSITIVE")))
    ids = setup.encoder.encode(data.texts)
    labels = list(data.labels)
    return setup.model, Examples(ids[:100], labels[:100]), Examples(ids[100:], labels[100:]), setup.encoder, file


def training_source(file):
    from toolchain.data.inputs import TrainingSource

    return TrainingSource(str(file))


def disturbed_copy(model):
    """Returns a student: a copy of the model with random changes in one layer."""
    torch.manual_seed(0)
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.distilbert.transformer.layer[1].parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return student


def squared_distance(first_model, second_model, rows, encoder):
    with torch.inference_mode():
        return sum(
            float((first_model(**b.inputs).logits - second_model(**b.inputs).logits).square().sum())
            for b in rows.batches(encoder)
        )


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def quiet(*_):
    pass


def test_training_brings_a_student_closer_to_its_teacher(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    student = disturbed_copy(teacher)
    distance_before = squared_distance(student, teacher, rows, encoder)
    history = train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)
    assert squared_distance(student, teacher, rows, encoder) < distance_before / 2
    assert history["steps"] == 2 * 13
    assert len(history["held_out_accuracy"]) == 3
    assert (
        history["held_out_loss"][history["best_epoch"]] == min(history["held_out_loss"]) < history["held_out_loss"][0]
    )


class _RunStopped(Exception):
    pass


@pytest.mark.parametrize("step", [5, 13, 20, 26])
@pytest.mark.parametrize("exits", [0.0, 1.0])
def test_a_resumed_run_ends_with_exactly_the_same_weights(task, tmp_path, monkeypatch, step, exits):
    recipe = replace(RECIPE, exits=exits)
    teacher, rows, held_out, encoder, _ = task
    complete_student = disturbed_copy(teacher)
    history = train(
        (complete_student, copy.deepcopy(teacher)), (rows, held_out), encoder, recipe, (tmp_path / "whole", "k"), quiet
    )
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)  # With an interval of 0 s, training saves its state after each step.

    def stop(done, total, label):
        if label.startswith("epoch") and done == step:
            raise _RunStopped

    student = disturbed_copy(teacher)
    with pytest.raises(_RunStopped):
        train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, recipe, (tmp_path / "part", "k"), stop)
    progress_calls = []
    student = disturbed_copy(teacher)
    resume = (tmp_path / "part", "k")
    resumed_history = train(
        (student, copy.deepcopy(teacher)),
        (rows, held_out),
        encoder,
        recipe,
        resume,
        lambda *a: progress_calls.append(a),
    )
    # the resumed run skips the finished steps
    assert [done for done, _, _ in progress_calls] == list(range(step + 1, 27))
    assert resumed_history["held_out_accuracy"] == history["held_out_accuracy"]
    assert resumed_history["best_epoch"] == history["best_epoch"]
    assert torch.equal(flat_weights(student), flat_weights(complete_student))


@pytest.mark.parametrize(
    "changes", [{"step": 99}, {"held_out": []}, {"best": 7}, {"scale": "x"}, {"surprise": 1}, {"key": ["k"]}]
)
def test_a_damaged_state_is_refused(task, tmp_path, monkeypatch, changes):
    teacher, rows, held_out, encoder, _ = task
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)

    def stop(done, total, label):
        if done == 2:
            raise _RunStopped

    arguments = (rows, held_out), encoder, RECIPE, (tmp_path, "k")
    with pytest.raises(_RunStopped):
        train((disturbed_copy(teacher), copy.deepcopy(teacher)), *arguments, stop)
    file = tmp_path / loop.STATE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=r"does not hold an interrupted training: .*Delete this folder"):
        train((disturbed_copy(teacher), copy.deepcopy(teacher)), *arguments, quiet)


def test_a_run_with_another_key_starts_from_the_beginning(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    train(
        (disturbed_copy(teacher), copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "one"), quiet
    )
    progress_calls = []
    models = (disturbed_copy(teacher), copy.deepcopy(teacher))
    train(models, (rows, held_out), encoder, RECIPE, (tmp_path, "two"), lambda *a: progress_calls.append(a))
    assert progress_calls[0][0] == 1


def test_training_stops_early_where_accuracy_falls(task, tmp_path, monkeypatch):
    teacher, rows, held_out, encoder, _ = task
    scores = iter([0.9, 0.5, 0.4, 0.8, 0.8])
    monkeypatch.setattr(loop, "score", lambda *_: next(scores))
    student = disturbed_copy(teacher)
    weights_before = flat_weights(student)
    # If the weight `task` is above 0, the loss includes the labels, so training keeps the epoch with the best accuracy.
    recipe = Recipe(epochs=4, learning_rate=2e-3, batch_size=8, task=0.5)
    history = train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, recipe, (tmp_path, "k"), quiet)
    assert history["held_out_accuracy"] == [0.9, 0.5, 0.4]
    assert history["best_epoch"] == 0
    assert torch.equal(flat_weights(student), weights_before)


def test_training_without_labels_keeps_the_epoch_of_the_least_loss(task, tmp_path, monkeypatch):
    """While the learning rate is high, accuracy varies from epoch to epoch.

    Because accuracy varies between epochs, early stopping by accuracy would miss the better weights of later epochs.
    """
    teacher, rows, held_out, encoder, _ = task
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(loop, "score", lambda *_: next(scores))
    recipe = Recipe(epochs=3, learning_rate=2e-3, batch_size=8)
    models = (disturbed_copy(teacher), copy.deepcopy(teacher))
    history = train(models, (rows, held_out), encoder, recipe, (tmp_path, "k"), quiet)
    losses = history["held_out_loss"]
    assert len(losses) == 4
    assert history["best_epoch"] == losses.index(min(losses)) > 0


def test_a_loss_that_is_not_finite_raises_a_data_error(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    broken_teacher = copy.deepcopy(teacher)
    with torch.no_grad():
        broken_teacher.classifier.bias[0] = float("nan")
    with pytest.raises(DataError, match="the loss is nan at step 0"):
        train((disturbed_copy(teacher), broken_teacher), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)


def test_each_epoch_has_every_row_once_in_another_order(task):
    rows = task[1]
    first, second = (loop._shuffle_batches(rows, RECIPE, epoch) for epoch in (0, 1))
    for order in (first, second):
        assert sorted(row for part in order for row in part) == list(range(100))
    assert first != second
    assert first == loop._shuffle_batches(rows, RECIPE, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=20), min_size=1, max_size=9),
    st.integers(0, 20),
    st.floats(0, 1),
)
def test_augmented_rows_are_the_original_rows_and_masked_pairs(ids, pairs, share):
    rows = AugmentedExamples(ids, list(range(len(ids))), pairs, -1, share, 20, 24)
    augmented = rows.of_epoch(0)
    assert augmented.ids[: len(ids)] == ids
    assert augmented.labels[: len(ids)] == rows.labels
    assert len(augmented.ids) == len(augmented.labels) == len(ids) + pairs

    def is_masked_pair(pair, first, second):
        joined = [*first[:-1], *second[1:]]
        joined = [*joined[:-1][:23], joined[-1]]
        return len(pair) == len(joined) <= 24 and all(
            new_token == old_token or (new_token == -1 and 0 < index < len(joined) - 1)
            for index, (old_token, new_token) in enumerate(zip(joined, pair, strict=True))
        )

    for pair, label in zip(augmented.ids[len(ids) :], augmented.labels[len(ids) :], strict=True):
        assert any(is_masked_pair(pair, first, ids[label]) for first in ids)
    assert augmented == rows.of_epoch(0)


def test_each_epoch_has_other_masked_pairs():
    rows = AugmentedExamples([[1, token, 2] for token in range(10, 90)], [0, 1] * 40, 50, -1, 0.2, 20, 24)
    first, second = rows.of_epoch(0), rows.of_epoch(1)
    assert first.ids[:80] == second.ids[:80] == rows.ids
    assert first.ids[80:] != second.ids[80:]
    assert len(first.ids) == len(second.ids)
    examples = Examples(rows.ids, rows.labels)
    assert examples.of_epoch(1) is examples


def test_the_fraction_of_masked_tokens_is_the_requested_one():
    augmented = AugmentedExamples([[5] * 102] * 100, [0] * 100, 50, -1, 0.15, 20, 512).of_epoch(0)
    assert 0.14 < sum(row.count(-1) for row in augmented.ids) / 10_000 < 0.16


@pytest.mark.parametrize(
    ("config", "mask_id"),
    [
        ('{"mask_token": "[MASK]"}', 103),
        ('{"mask_token": {"content": "[MASK]"}}', 103),
        ('{"mask_token": null}', None),
        ('{"mask_token": "<absent token>"}', None),
        (None, None),
    ],
)
def test_mask_token_is_none_where_the_tokenizer_has_none(task, tmp_path, config, mask_id):
    if config:
        (tmp_path / "tokenizer_config.json").write_text(config)
    assert mask_token(tmp_path, task[3]) == mask_id


@pytest.mark.slow
def test_a_killed_recovery_continues_and_removes_its_saved_state(tiny, task, tmp_path):
    """Runs the command line and kills it in the middle of training."""
    file = task[4]
    arguments = ["prune", "--ratio", "0.5", "--recover", "3", "--model", "tiny", "--exported", str(tiny.exported)]
    arguments += ["--train-data", str(file)]
    code = (
        "import sys, time, toolchain.training.loop as t; from toolchain.cli import main; "
        "t.SAVE_EVERY_S = 0; learn = t._Run.learn; "
        "t._Run.learn = lambda run, part: (time.sleep(0.3), learn(run, part))[1]; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if "epoch" in line:
            break
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    resume = publishing.work_folder(tiny.path("torch-pruned50-r3")) / "training"
    assert (resume / "state.json").is_file()
    assert not tiny.path("torch-pruned50-r3").exists()
    workspace = Workspace(tiny.exported, tiny.model, tiny.source, training_source(file))
    steps = {"torch-pruned50": Prune(0.5), "torch-pruned50-r3": Recover(3)}
    events = []
    artifact = ensure(workspace, steps, steps, lambda event: events.append(str(event)))["torch-pruned50-r3"]
    assert not resume.exists()
    assert artifact.manifest.facts["recovery"]["masked"] == 0.2
    assert artifact.manifest.facts["recovery"]["teacher"] == tiny.load("torch-fp32").manifest.id
    assert artifact.manifest.facts["pruning"] == tiny.load("torch-pruned50").manifest.facts["pruning"]
    assert any("accuracy on" in line and "held-out rows" in line for line in events)
    assert Encoder.open(artifact.path, ("input_ids", "attention_mask"), 512)


def test_training_changes_no_embedding_of_a_token_outside_the_rows(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    student = disturbed_copy(teacher)
    embeddings_before = student.distilbert.embeddings.word_embeddings.weight.detach().clone()
    train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)
    changed_tokens = (
        (student.distilbert.embeddings.word_embeddings.weight != embeddings_before).any(dim=1).nonzero().squeeze(1)
    )
    row_tokens = {token for row in rows.ids for token in row}
    assert set(changed_tokens.tolist()) <= row_tokens | {encoder.pad_id}
    assert len(changed_tokens) > 0.9 * len(row_tokens)


def test_matched_layers_skip_removed_layers(task):
    """Pruning refits the LayerNorm before a removed layer.

    Pruning changes the hidden states at the input of a removed layer, so training does not compare these hidden states
    with the teacher's.
    """
    model = copy.deepcopy(task[0])
    assert architectures.matched_layers(model) == [1, 2]
    architectures.keep_units(model, 1, (), ())
    assert architectures.matched_layers(model) == [2]


def unexplained_share(model, teacher, rows, encoder):
    """Returns the share of the variance of the teacher's logits that a linear head after layer 1 does not explain."""
    parts = rows.batches(encoder)
    with torch.inference_mode():
        states = [model(**part.inputs, output_hidden_states=True).hidden_states[1] for part in parts]
        masks = [part.inputs["attention_mask"].unsqueeze(-1) for part in parts]
        means = torch.cat([(s * mask).sum(1) / mask.sum(1) for s, mask in zip(states, masks, strict=True)])
        logits = torch.cat([teacher(**part.inputs).logits for part in parts])
    design = torch.cat([means, torch.ones(len(means), 1)], dim=1)
    residual = logits - design @ torch.linalg.lstsq(design, logits).solution
    return float(residual.square().sum() / (logits - logits.mean(0)).square().sum())


def test_training_for_exits_makes_early_layers_predict_better(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    unexplained = {}
    for exits in (0.0, 100.0):  # the predictions of the tiny teacher differ little, so their loss is small
        recipe = replace(RECIPE, epochs=8, exits=exits, patience=8)
        student = disturbed_copy(teacher)
        history = train(
            (student, copy.deepcopy(teacher)), (rows, held_out), encoder, recipe, (tmp_path / str(exits), "k"), quiet
        )
        assert history["exits"] == exits
        assert {name for name, _ in student.named_parameters()} == {name for name, _ in teacher.named_parameters()}
        unexplained[exits] = unexplained_share(student, teacher, rows, encoder)
    assert unexplained[100.0] < 0.9 * unexplained[0.0]


def test_heads_ignore_padding(task):
    model = task[0]
    exit_heads = ExitHeads(model, (0, 2), seed=1)
    states = [torch.randn(2, 4, model.config.hidden_size) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    changed = [state.clone() for state in states]
    for state in changed:
        state[1, 2:] += 1
    for logits, same in zip(exit_heads(states, mask), exit_heads(changed, mask), strict=True):
        assert logits.shape == (2, 2)
        assert torch.equal(logits, same)


def test_hidden_states_of_padding_do_not_change_the_loss(task):
    from types import SimpleNamespace

    torch.manual_seed(1)
    states = [torch.randn(2, 4, 8) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    outputs = SimpleNamespace(logits=torch.randn(2, 2), hidden_states=states)
    changed_padding, changed_tokens = ([state.clone() for state in states] for _ in range(2))
    changed_padding[1][1, 2:] += 1
    changed_tokens[1][1, 1] += 1
    padding_loss, token_loss = (
        float(
            losses.loss(
                SimpleNamespace(logits=outputs.logits, hidden_states=s),
                outputs,
                [],
                {"attention_mask": mask},
                Batch({}, torch.tensor([0, 1]), [0, 1]),
                losses.Weights(0.0, 1.0, 2.0, matched=(1, 2)),
            )
        )
        for s in (changed_padding, changed_tokens)
    )
    assert padding_loss == pytest.approx(0, abs=1e-6)
    assert token_loss > 0.01


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from([1, 4, 8]))
def test_the_width_of_a_batch_is_a_multiple_within_the_maximum_length(lengths, multiple):
    encoder = Encoder(Path(), None, ("input_ids", "attention_mask"), 0, 60)
    part = batch(range(len(lengths)), [[7] * length for length in lengths], [0] * len(lengths), encoder, multiple)
    width = part.inputs["input_ids"].shape[1]
    assert max(lengths) <= width < max(lengths) + multiple
    assert width <= 60
    assert width % multiple == 0 or width == 60
    assert part.inputs["attention_mask"].sum(1).tolist() == lengths
