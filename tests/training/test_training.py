"""Recovery learns, keeps its best weights, and resumes after a kill with the same result."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.artifacts import publishing
from toolchain.artifacts.steps import Prune, Recover
from toolchain.build.pipeline import ensure
from toolchain.build.steps.recover import AugmentedExamples, _mask_token
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import Encoder
from toolchain.data.labels import LabelSet
from toolchain.errors import DataError
from toolchain.models import architectures
from toolchain.pruning.setup import shared_setup
from toolchain.training import loop, losses
from toolchain.training.batches import batch
from toolchain.training.loop import Examples, Recipe, train

RECIPE = Recipe(epochs=2, learning_rate=2e-3, batch_size=8)


@pytest.fixture(scope="module")
def task(built_tiny, tmp_path_factory):
    """The tiny model, a teacher, rows, held-out rows and their encoder."""
    file = tmp_path_factory.mktemp("train") / "train.csv"
    words = ["good", "bad", "film", "dull", "bright", "a", "the", "story"]
    rows = [f"{' '.join(words[(i * k) % 8] for k in range(1, 4 + i % 9))},{i % 2}" for i in range(120)]
    file.write_text("sentence,label\n" + "\n".join(rows) + "\n")
    source = training_source(file)
    given = shared_setup(built_tiny.load("torch-fp32"), source, 100, 20)
    data = source.load(LabelSet(("NEGATIVE", "POSITIVE")))
    ids = given.encoder.encode(data.texts)
    labels = list(data.labels)
    return given.model, Examples(ids[:100], labels[:100]), Examples(ids[100:], labels[100:]), given.encoder, file


def training_source(file):
    from toolchain.data.inputs import TrainingSource

    return TrainingSource(str(file))


def weakened(model):
    """A student: the teacher with a disturbed layer."""
    torch.manual_seed(0)
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.distilbert.transformer.layer[1].parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return student


def far(one, other, rows, encoder):
    with torch.inference_mode():
        return sum(
            float((one(**b.inputs).logits - other(**b.inputs).logits).square().sum()) for b in rows.batches(encoder)
        )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def quiet(*_):
    pass


def test_a_student_comes_closer_to_its_teacher(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    student = weakened(teacher)
    before = far(student, teacher, rows, encoder)
    history = train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)
    assert far(student, teacher, rows, encoder) < before / 2
    assert history["steps"] == 2 * 13
    assert len(history["held_out_accuracy"]) == 3
    assert (
        history["held_out_loss"][history["best_epoch"]] == min(history["held_out_loss"]) < history["held_out_loss"][0]
    )


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [5, 13, 20, 26])
def test_a_stopped_run_ends_with_the_same_weights_to_the_bit(task, tmp_path, monkeypatch, at):
    teacher, rows, held_out, encoder, _ = task
    whole = weakened(teacher)
    history = train(
        (whole, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path / "whole", "k"), quiet
    )
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)  # every step is saved

    def stop(done, total, what):
        if what.startswith("epoch") and done == at:
            raise _Stopped

    student = weakened(teacher)
    with pytest.raises(_Stopped):
        train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path / "part", "k"), stop)
    seen = []
    student = weakened(teacher)
    resume = (tmp_path / "part", "k")
    again = train(
        (student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, resume, lambda *a: seen.append(a)
    )
    assert [done for done, _, _ in seen] == list(range(at + 1, 27))  # not the first steps again
    assert again["held_out_accuracy"] == history["held_out_accuracy"]
    assert again["best_epoch"] == history["best_epoch"]
    assert torch.equal(weights(student), weights(whole))


def test_a_run_of_another_key_starts_anew(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    train((weakened(teacher), copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "one"), quiet)
    seen = []
    models = (weakened(teacher), copy.deepcopy(teacher))
    train(models, (rows, held_out), encoder, RECIPE, (tmp_path, "two"), lambda *a: seen.append(a))
    assert seen[0][0] == 1


def test_training_stops_early_without_gain_and_restores_the_first_weights(task, tmp_path, monkeypatch):
    teacher, rows, held_out, encoder, _ = task
    scores = iter([0.9, 0.5, 0.4, 0.8, 0.8])
    monkeypatch.setattr(loop, "accuracy", lambda *_: next(scores))
    student = weakened(teacher)
    before = weights(student)
    recipe = Recipe(epochs=4, learning_rate=2e-3, batch_size=8, task=0.5)  # labels count: accuracy decides
    history = train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, recipe, (tmp_path, "k"), quiet)
    assert history["held_out_accuracy"] == [0.9, 0.5, 0.4]
    assert history["best_epoch"] == 0
    assert torch.equal(weights(student), before)


def test_pure_distillation_keeps_the_epoch_of_the_lowest_loss(task, tmp_path, monkeypatch):
    """At a high learning rate accuracy varies, so it would discard later, better weights."""
    teacher, rows, held_out, encoder, _ = task
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(loop, "accuracy", lambda *_: next(scores))
    recipe = Recipe(epochs=3, learning_rate=2e-3, batch_size=8)
    models = (weakened(teacher), copy.deepcopy(teacher))
    history = train(models, (rows, held_out), encoder, recipe, (tmp_path, "k"), quiet)
    losses = history["held_out_loss"]
    assert len(losses) == 4
    assert history["best_epoch"] == losses.index(min(losses)) > 0


def test_a_loss_that_is_not_finite_ends_it_in_words(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.classifier.bias[0] = float("nan")
    with pytest.raises(DataError, match="the loss is nan at step 0"):
        train((weakened(teacher), broken), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)


def test_every_row_comes_once_an_epoch_and_epochs_differ(task):
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
def test_rows_come_as_they_are_and_again_in_masked_pairs(ids, pairs, share):
    rows = AugmentedExamples(ids, list(range(len(ids))), pairs, -1, share, 20, 24)
    more = rows.of_epoch(0)
    assert more.ids[: len(ids)] == ids
    assert more.labels[: len(ids)] == rows.labels
    assert len(more.ids) == len(more.labels) == len(ids) + pairs

    def is_of(pair, one, other):
        whole = [*one[:-1], *other[1:]]
        whole = [*whole[:-1][:23], whole[-1]]
        return len(pair) == len(whole) <= 24 and all(
            new == old or (new == -1 and 0 < at < len(whole) - 1)
            for at, (old, new) in enumerate(zip(whole, pair, strict=True))
        )

    for pair, label in zip(more.ids[len(ids) :], more.labels[len(ids) :], strict=True):
        assert any(is_of(pair, one, ids[label]) for one in ids)
    assert more == rows.of_epoch(0)


def test_every_epoch_has_other_pairs():
    rows = AugmentedExamples([[1, at, 2] for at in range(10, 90)], [0, 1] * 40, 50, -1, 0.2, 20, 24)
    first, second = rows.of_epoch(0), rows.of_epoch(1)
    assert first.ids[:80] == second.ids[:80] == rows.ids
    assert first.ids[80:] != second.ids[80:]
    assert len(first.ids) == len(second.ids)
    plain = Examples(rows.ids, rows.labels)
    assert plain.of_epoch(1) is plain


def test_the_share_of_masked_tokens_is_the_one_asked_for():
    more = AugmentedExamples([[5] * 102] * 100, [0] * 100, 50, -1, 0.15, 20, 512).of_epoch(0)
    assert 0.14 < sum(row.count(-1) for row in more.ids) / 10_000 < 0.16


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ('{"mask_token": "[MASK]"}', 103),
        ('{"mask_token": {"content": "[MASK]"}}', 103),
        ('{"mask_token": null}', None),
        ('{"mask_token": "<none of its tokens>"}', None),
        (None, None),
    ],
)
def test_a_tokenizer_without_a_mask_masks_nothing(task, tmp_path, config, found):
    if config:
        (tmp_path / "tokenizer_config.json").write_text(config)
    assert _mask_token(tmp_path, task[3]) == found


@pytest.mark.slow
def test_a_killed_recovery_is_taken_up_and_cleans_up(tiny, task, tmp_path):
    """The command line, killed by the system in the middle of training."""
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
    asked = {"torch-pruned50": Prune(0.5), "torch-pruned50-r3": Recover(3)}
    said = []
    built = ensure(workspace, asked, asked, lambda event: said.append(str(event)))["torch-pruned50-r3"]
    assert not resume.exists()
    assert built.manifest.facts["recovery"]["masked"] == 0.2
    assert built.manifest.facts["recovery"]["teacher"] == tiny.load("torch-fp32").manifest.id
    assert built.manifest.facts["pruning"] == tiny.load("torch-pruned50").manifest.facts["pruning"]
    assert any("accuracy on" in line and "held-out rows" in line for line in said)
    assert Encoder.open(built.path, ("input_ids", "attention_mask"), 512)


def test_embeddings_of_tokens_that_no_row_has_stay_as_they_are(task, tmp_path):
    teacher, rows, held_out, encoder, _ = task
    student = weakened(teacher)
    before = student.distilbert.embeddings.word_embeddings.weight.detach().clone()
    train((student, copy.deepcopy(teacher)), (rows, held_out), encoder, RECIPE, (tmp_path, "k"), quiet)
    changed = (student.distilbert.embeddings.word_embeddings.weight != before).any(dim=1).nonzero().squeeze(1)
    seen = {token for row in rows.ids for token in row}
    assert set(changed.tolist()) <= seen | {encoder.pad_id}
    assert len(changed) > 0.9 * len(seen)


def test_a_removed_layer_is_matched_by_the_layer_before_it(task):
    """The layer before it takes its place."""
    model = copy.deepcopy(task[0])
    assert architectures.matched_layers(model) == [1, 2]
    architectures.keep_units(model, 1, (), ())
    assert architectures.matched_layers(model) == [2]


def test_padding_does_not_count_as_distance(task):
    from types import SimpleNamespace

    torch.manual_seed(1)
    states = [torch.randn(2, 4, 8) for _ in range(3)]
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    outputs = SimpleNamespace(logits=torch.randn(2, 2), hidden_states=states)
    at_padding, elsewhere = ([state.clone() for state in states] for _ in range(2))
    at_padding[1][1, 2:] += 1
    elsewhere[1][1, 1] += 1
    same, other = (
        float(
            losses.loss(
                SimpleNamespace(logits=outputs.logits, hidden_states=s),
                outputs,
                {"attention_mask": real},
                torch.tensor([0, 1]),
                losses.Weights(0.0, 1.0, 2.0, (1, 2)),
            )
        )
        for s in (at_padding, elsewhere)
    )
    assert same == pytest.approx(0, abs=1e-6)
    assert other > 0.01


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from([1, 4, 8]))
def test_a_batch_is_as_wide_as_the_next_multiple_within_what_the_model_takes(lengths, multiple):
    encoder = Encoder(Path(), None, ("input_ids", "attention_mask"), 0, 60)
    part = batch(range(len(lengths)), [[7] * length for length in lengths], [0] * len(lengths), encoder, multiple)
    width = part.inputs["input_ids"].shape[1]
    assert max(lengths) <= width < max(lengths) + multiple
    assert width <= 60
    assert width % multiple == 0 or width == 60
    assert part.inputs["attention_mask"].sum(1).tolist() == lengths
