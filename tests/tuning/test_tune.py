"""Tests of the search in `tune`: it finds the best candidate with few trainings, and it can continue after a stop."""

import itertools
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_checkpoint, write_short_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from short_bench import SHORT

from toolchain import tuning
from toolchain.artifacts.steps import EXITS_WEIGHT, Quantize
from toolchain.artifacts.variants import lineage
from toolchain.build import pipeline
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.options import Duration
from toolchain.data import inputs
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, PruningError, VerdictError
from toolchain.progress import no_bar
from toolchain.tuning import _choose_start, _fit_in_time, search
from toolchain.tuning.candidates import (
    DEPTHS,
    EPOCHS,
    FP32_LAYERS,
    RATIOS,
    SPACE,
    Candidate,
    all_candidates,
    baseline_candidate,
    first_candidate,
    is_hopeless,
    next_start,
)
from toolchain.tuning.study import Outcome, open_study


def quiet(*_):
    pass


class World:
    """Invents the accuracy drop, speed and size of each candidate instead of building and measuring the candidate.

    A higher pruning ratio makes a candidate faster and less accurate; more epochs of recovery make it more accurate.
    `slope` is the accuracy drop, in points, for each per cent of the pruning ratio. `gain` is the fraction of
    the accuracy drop that each epoch of recovery removes. Candidates with fewer layers are slightly less accurate and
    much faster.
    """

    def __init__(self, slope=0.05, gain=0.5):
        self.slope, self.gain, self.candidates = slope, gain, []

    def __call__(self, candidate):
        self.candidates.append(candidate)
        return self.outcome(candidate)

    def outcome(self, candidate):
        shallow = 100 - candidate.depth if candidate.ratio else 0
        drop = (self.slope * candidate.ratio + shallow / 200) * (1 - self.gain) ** candidate.epochs
        drop += 0.3 / (1 + candidate.keep_fp32) + (0.4 if candidate.embeddings == "int4" else 0)
        speed = 1 + candidate.ratio / 30 + shallow / 50 - 0.05 * candidate.keep_fp32
        size = 20 - candidate.ratio / 10 + candidate.keep_fp32 - (5 if candidate.embeddings == "int4" else 0)
        return Outcome(list(candidate.chain(6))[-1], "id", round(drop, 3), speed, speed, int(1e6 * size))


class SlowWorld(World):
    """Invents results as the class `World` does, and also advances the simulated `clock` for each candidate.

    A candidate that needs a new training takes 100 s per epoch. A candidate that needs no new training takes `rest_s`
    seconds.
    """

    def __init__(self, clock, rest_s=1, **world):
        super().__init__(**world)
        self.clock, self.rest_s, self.trainings = clock, rest_s, set()

    def __call__(self, candidate):
        is_new = candidate.epochs and candidate.training not in self.trainings
        self.clock[0] += 100 * candidate.epochs if is_new else self.rest_s
        self.trainings |= {candidate.training} if candidate.epochs else set()
        return replace(super().__call__(candidate), training_s=100.0 * candidate.epochs)


def run(path, world, objective="latency", max_drop=1.0, seconds=60.0):
    with open_study(path, objective, max_drop, ["model", "train"], quiet) as study:
        search(study, world, time.monotonic() + seconds, quiet)
        return study.best, study.front, dict(study.outcomes)


def test_names_state_the_settings_and_candidates_share_variants():
    chain = Candidate(75, "latency", 1, "dynamic", "int8", 2).chain(6)
    assert list(chain) == [
        "torch-pruned75+tune-latency",
        "torch-pruned75-r1+tune-latency",
        "onnx-std-pruned75-r1+tune-latency",
        "onnx-pruned75-r1+tune-latency",
        "onnx-pruned75-r1-int8+tune-latency-keep2",
    ]
    assert list(Candidate(75, "latency", 1).chain(6))[:-1] == list(chain)[:-1]
    assert next(iter(Candidate(75, "latency", 1, depth=67).chain(6))) == "torch-pruned75+tune-latency-4layers"
    assert list(Candidate(75, depth=50).chain(12)) == [
        "torch-pruned75+tune-6layers",
        "onnx-std-pruned75+tune-6layers",
        "onnx-pruned75+tune-6layers",
        "onnx-pruned75-int8+tune-6layers",
    ]
    assert Candidate(75, depth=50).steps(1)[0].layers == 1
    assert list(Candidate(keep_fp32=2).chain(6)) == ["onnx-int8+tune-keep2"]
    assert list(Candidate(scheme="int4", embeddings="int4").chain(6)) == ["onnx-int4+tune"]
    assert list(Candidate(scheme="int4").chain(6)) == ["onnx-int4+tune-int8tables"]
    for name in chain:
        assert lineage(name)[0].name == "torch-fp32"


@given(st.floats(0.001, 0.2), st.floats(0.0, 0.9))
@settings(max_examples=30, deadline=None)
def test_next_start_finds_the_largest_ratio(slope, gain):
    world, excess_by_training = World(slope, gain), {}
    while (candidate := next_start("latency", excess_by_training, set(), 1.0)) is not None:
        assert candidate.training not in excess_by_training
        excess_by_training[candidate.training] = world.outcome(candidate).drop - 1.0

    def ratios_within(epochs):
        return [ratio for ratio in RATIOS if world.outcome(first_candidate("latency", ratio, epochs)).drop <= 1.0]

    largest = max(ratio for (ratio, *_), excess in excess_by_training.items() if excess <= 0 or ratio == 0)
    assert largest == max(ratios_within(EPOCHS[-1]), default=0)
    extra_steps = len(ratios_within(EPOCHS[-1])) - len(ratios_within(EPOCHS[1]))
    assert len(excess_by_training) <= 1 + len(RATIOS).bit_length() + extra_steps + 2 * len(EPOCHS[1:])


candidates = st.builds(
    Candidate,
    st.sampled_from(RATIOS),
    st.sampled_from(("latency", "parameters")),
    st.sampled_from(EPOCHS),
    st.just("dynamic"),
    st.just("int8"),
    st.sampled_from(FP32_LAYERS),
    st.just(False),
    st.sampled_from(DEPTHS),
)


@given(candidates, st.lists(candidates, max_size=6))
@settings(deadline=None)
def test_a_hopeless_candidate_cannot_win(candidate, rivals):
    world = World()
    is_kept = {rival: world.outcome(rival).drop <= 1.0 for rival in rivals}
    if candidate in is_kept or not is_hopeless("latency", candidate, is_kept):
        return  # The test covers only candidates that the search never measures.
    outcome = world.outcome(candidate)
    best = max((world.outcome(rival).latency for rival, within_drop in is_kept.items() if within_drop), default=0)
    assert outcome.drop > 1.0 or outcome.latency <= best


@pytest.mark.parametrize("objective", ["latency", "throughput", "size"])
def test_candidates_have_different_names(objective):
    names = [list(candidate.chain(6))[-1] for candidate in all_candidates(objective)]
    assert len(set(names)) == len(names) > 100


@pytest.mark.slow
def test_the_search_finds_the_best_and_trains_only_candidates_that_can_win(tmp_path):
    world = World()
    best, front, outcomes = run(tmp_path / "study", world)
    all_candidates = [
        Candidate(ratio, cost, epochs, keep_fp32=keep, depth=depth)
        for ratio in RATIOS
        for depth in DEPTHS
        for cost in ("latency", "parameters")
        for epochs in EPOCHS
        for keep in FP32_LAYERS
    ]
    kept_outcomes = [world.outcome(candidate) for candidate in all_candidates if world.outcome(candidate).drop <= 1.0]
    assert best.latency == max(outcome.latency for outcome in kept_outcomes)
    assert len(world.candidates) == len(set(world.candidates)) == len(outcomes) < len(all_candidates) / 2
    for index, candidate in enumerate(world.candidates):
        if candidate.epochs:
            earlier = world.candidates[:index]
            assert candidate.untrained in earlier
            assert world.outcome(candidate.untrained).drop > 1.0
            rivals = [world.outcome(cost) for cost in earlier if world.outcome(cost).drop <= 1.0]
            assert all(world.outcome(candidate).latency > rival.latency for rival in rivals)
    drops, speeds = [o.drop for o in front], [o.latency for o in front]
    assert drops == sorted(drops)
    assert speeds == sorted(speeds)
    assert best in front


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["throughput", "size"])
def test_the_search_finds_the_best_for_other_objectives(tmp_path, objective):
    best, _, outcomes = run(tmp_path / "study", World(), objective, seconds=10)
    kept_outcomes = [outcome for outcome in outcomes.values() if outcome.drop <= 1.0]
    figure = {"throughput": lambda o: -o.throughput, "size": lambda o: o.size}[objective]
    assert figure(best) == min(map(figure, kept_outcomes))


@pytest.mark.slow
def test_a_second_run_does_not_measure_again(tmp_path):
    first_run, second_run = World(), World()
    first_result = run(tmp_path / "study", first_run)
    second_result = run(tmp_path / "study", second_run)
    assert second_run.candidates == []
    assert second_result == first_result
    other_run = World()
    run(tmp_path / "study", other_run, max_drop=2.0)
    assert other_run.candidates


def test_a_study_ignores_trials_outside_its_search_space(tmp_path, monkeypatch):
    path = tmp_path / "study"
    with monkeypatch.context() as patch:
        patch.setitem(SPACE, "latency", {**SPACE["latency"], "ratio": (0, 25)})
        with open_study(path, "latency", 1.0, ["model", "train"], quiet) as study:
            trial, candidate = study.ask(None)
            study.tell(trial, candidate, World().outcome(candidate))
        all_candidates.cache_clear()
    with open_study(path, "latency", 1.0, ["model", "train"], quiet) as study:
        assert study.outcomes == {}
        study.ask(None)


def test_a_search_needs_no_lock_file_of_optuna(tmp_path):
    """Earlier releases left this link when they were killed at the wrong moment, and the next search never ended."""
    path = tmp_path / "study"
    Path(f"{path}.lock").symlink_to("nowhere")
    code = "import sys, pathlib; from toolchain.tuning.study import open_study\n"
    code += "with open_study(pathlib.Path(sys.argv[1]), 'latency', 1.0, ['model'], print) as study: study.ask(None)"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def test_near_the_limit_the_search_trains_longer_before_it_raises_the_ratio():
    excess_by_training = {first_candidate("latency", 0, 0).training: -1.0}

    for ratio, epochs, points in ((70, 1, 0.9), (70, 4, -0.1), (73, 4, 0.1)):
        candidate = next_start("latency", excess_by_training, set(), 1.0)
        assert (candidate.ratio, candidate.epochs) == (ratio, epochs)
        excess_by_training[candidate.training] = points


def test_a_trained_model_near_the_limit_is_first_quantised_otherwise(tmp_path):
    def outcome_of(points):
        return Outcome("variant", "id", points, 2.0, 2.0, 1)

    near_candidate, far_candidate = (Candidate(ratio, "latency", 4, depth=67) for ratio in (73, 88))
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        assert study.nearest_trained(study.remaining) is None
        study.outcomes |= {far_candidate: outcome_of(3.0), near_candidate: outcome_of(1.05)}
        candidate = study.nearest_trained(study.remaining)
        assert candidate != near_candidate
        assert candidate.training == near_candidate.training
        study.outcomes[near_candidate] = outcome_of(0.95)
        assert study.nearest_trained(study.remaining) is None


def test_the_search_raises_the_ratio_where_another_quantisation_is_within_the_drop(tmp_path):
    def outcome_of(points):
        return Outcome("variant", "id", points, 2.0, 2.0, 1)

    dynamic_candidate = first_candidate("latency", 70, 4)
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.outcomes |= {
            first_candidate("latency", 0, 0): outcome_of(0.1),
            first_candidate("latency", 70, 1): outcome_of(1.9),
            dynamic_candidate: outcome_of(1.25),
        }
        assert next_start("latency", study.excess_drops, set(), 1.0).ratio < 70
        study.outcomes[replace(dynamic_candidate, scheme="static")] = outcome_of(0.7)
        assert next_start("latency", study.excess_drops, set(), 1.0) == first_candidate("latency", 73, 4)
        # Dynamic int8 exceeds the allowed accuracy drop at a pruning ratio of 70 %, so the search does not try 73 %.
        assert _choose_start(study, study.remaining) == replace(first_candidate("latency", 73, 4), scheme="static")


def test_a_trained_candidate_always_fits_the_time(tmp_path):
    trained_candidate = Candidate(70, "latency", 4, depth=67)
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.outcomes[trained_candidate] = Outcome("variant", "id", 1.25, 2.0, 2.0, 1, training_s=4000.0)
        candidates_in_time = _fit_in_time(study, study.remaining, remaining_s=60.0)
        assert {candidate.training for candidate in candidates_in_time if candidate.epochs} == {
            trained_candidate.training
        }
        # An earlier run of `tune` finished the training below, but did not measure the trained model.
        study.trained.add((67, "latency", 67, 4))
        candidates_in_time = _fit_in_time(study, study.remaining, remaining_s=60.0)
        assert {candidate.training for candidate in candidates_in_time if candidate.epochs} == {
            trained_candidate.training,
            *study.trained,
        }


def test_trained_candidates_come_first_where_a_new_training_does_not_fit(tmp_path, monkeypatch):
    clock = [0.0]
    world, trained_candidate = SlowWorld(clock), first_candidate("latency", 73, 4)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.trained.add(trained_candidate.training)
        world.trainings.add(trained_candidate.training)
        search(study, world, 110.0, quiet)
    trained_candidates = [candidate for candidate in world.candidates if candidate.epochs]
    assert trained_candidates[:2] == [
        next_start("latency", {first_candidate("latency", 0, 0).training: -1.0}, set(), 1.0),
        trained_candidate,
    ]
    assert {candidate.training for candidate in trained_candidates[1:]} == {trained_candidate.training}


@pytest.mark.slow
def test_a_stopped_search_continues_with_its_unfinished_candidate(tmp_path):
    class StoppedWorld(World):
        def __call__(self, candidate):
            if candidate.epochs:
                self.unfinished = candidate
                raise KeyboardInterrupt
            return super().__call__(candidate)

    world, second_world = StoppedWorld(), World()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study", world)
    best = run(tmp_path / "study", second_world)[0]
    assert second_world.candidates[0] == world.unfinished
    assert not set(world.candidates) & set(second_world.candidates)
    assert best.latency == run(tmp_path / "other", World())[0].latency


@pytest.mark.slow
def test_a_training_that_does_not_fit_the_time_is_left_for_the_next_run(tmp_path, monkeypatch):
    """A second training would take as long as the first one and exceed the time limit, so it waits for the next run."""
    clock = [0.0]
    world, second_world = SlowWorld(clock), SlowWorld(clock)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, world, 150.0, quiet)
    assert len(world.trainings) == 1
    assert clock[0] == 150  # until the time limit, the search measures candidates that need no training
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, second_world, clock[0] + 1000, quiet)
    assert any(candidate.epochs for candidate in second_world.candidates)
    assert not set(world.candidates) & set(second_world.candidates)


@pytest.mark.slow
def test_a_shorter_training_replaces_one_that_does_not_fit(tmp_path, monkeypatch):
    clock = [0.0]
    world = SlowWorld(clock, rest_s=0, gain=0.2)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        excess_by_training = {}
        while (start := next_start("latency", excess_by_training, set(), 1.0)) and start.epochs < 2:
            excess_by_training[start.training] = world.outcome(start).drop - 1.0
        time_limit = 100 * sum(bool(epochs) for *_, epochs in excess_by_training) + 150
        events = []
        search(study, world, time_limit, lambda event: events.append(str(event)))
    trained_candidates = [candidate for candidate in world.candidates if candidate.epochs]
    assert start is not None
    assert {candidate.epochs for candidate in trained_candidates} == {1}
    assert time_limit - 100 < clock[0] <= time_limit
    assert events[-1].startswith("no time is left for another training")


@pytest.mark.slow
def test_the_search_tries_no_ratio_above_a_refused_one(tmp_path):
    class NarrowWorld(World):
        def __call__(self, candidate):
            if candidate.ratio > 60:
                refused_candidates.append(candidate)
                raise PruningError("Nothing is left.", "Prune less.")
            return super().__call__(candidate)

    refused_candidates = []
    best, _, outcomes = run(tmp_path / "study", NarrowWorld(slope=0.001))
    assert max(candidate.ratio for candidate in outcomes) == 60
    # After pruning refuses a candidate, the search tries only candidates that prune less than the refused candidate.
    assert not [
        (earlier, later)
        for earlier, later in itertools.combinations(refused_candidates, 2)
        if later.prunes_as_much_as(earlier)
    ]
    assert best.latency == World(slope=0.001).outcome(Candidate(60, depth=50)).latency


@pytest.mark.slow
def test_a_candidate_that_fails_validation_is_tried_again_after_training(tmp_path):
    class UncertainWorld(World):
        def __call__(self, candidate):
            if candidate.ratio >= 80 and not candidate.epochs:
                self.candidates.append(candidate)
                raise VerdictError("It failed validation.", "Nothing was published.")
            return super().__call__(candidate)

    world = UncertainWorld(gain=0.9)
    best, _, outcomes = run(tmp_path / "study", world)
    assert best.latency == run(tmp_path / "other", World(gain=0.9))[0].latency
    assert any(candidate.ratio >= 80 for candidate in outcomes)
    assert len(world.candidates) == len(set(world.candidates))


def test_where_dynamic_int8_fails_validation_the_search_uses_static_int8(tmp_path):
    class UndecidedWorld(World):
        def __call__(self, candidate):
            if len(self.candidates) == 8:
                raise KeyboardInterrupt
            self.candidates.append(candidate)
            if candidate.scheme == "dynamic" and not candidate.keep_fp32:
                raise VerdictError("It failed validation.", "Nothing was published.")
            return self.outcome(candidate)

    world = UndecidedWorld()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study", world)
    baseline, *later_candidates = world.candidates
    assert baseline == first_candidate("latency", 0, 0)
    assert later_candidates[0] == replace(baseline, scheme="static")
    assert all(candidate.ratio and candidate.scheme == "static" for candidate in later_candidates[1:])


def test_the_next_run_knows_the_candidates_that_failed_validation(tmp_path):
    def refuse(candidate):
        raise VerdictError("It failed validation.", "Nothing was published.")

    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, refuse, time.monotonic() + 0.3, quiet)
        refused_candidates = set(study.refused)
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        assert study.refused == refused_candidates
    assert first_candidate("latency", 0, 0) in refused_candidates


@pytest.mark.parametrize("objective", ["latency", "throughput", "size"])
def test_as_baseline_returns_the_default_quantisation(objective):
    step = baseline_candidate(objective).steps(6)[-1]
    assert step == Quantize()


def test_a_duration_needs_a_number_and_a_unit():
    kind = Duration()
    assert [kind.convert(text, None, None) for text in ("90s", "20m", "1.5h", "2d")] == [90, 1200, 5400, 172_800]
    for wrong_text in ("20", "m", "-1m", "0m", "20 m", "1w", f"{'9' * 400}h"):
        with pytest.raises(Exception, match="not a duration"):
            kind.convert(wrong_text, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and data, in which `tune` builds its artifacts."""
    folder = tmp_path_factory.mktemp("tune")
    for name in ("train.csv", "validation.csv"):
        write_short_rows(folder / name, 120, labels=(1,))
    data = inputs.load_embedded()
    lines = [f'"{text.replace(chr(34), "")}",{label}' for text, label in zip(data.texts, data.labels, strict=True)]
    (folder / "sentences.csv").write_text("sentence,label\n" + "\n".join(lines[:400]) + "\n")
    make_checkpoint(folder / "decided", leaning=30)
    return folder


@pytest.fixture
def in_tune_folder(folder, monkeypatch, short_bench):
    """Makes `folder` the working directory, and shortens the measurements."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tuning, "PROTOCOL", SHORT)
    monkeypatch.setattr("toolchain.bench.roofline.rates", lambda *_: {})


@pytest.mark.slow
def test_tune_builds_and_measures_and_names_the_best_variant(in_tune_folder, say, folder):
    arguments = ("--model", "./decided", "--train-data", "train.csv", "--data", "validation.csv", "--budget", "1s")
    code, out, err = say("tune", *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["best"]["variant"] in [outcome["variant"] for outcome in report["front"]]
    assert re.fullmatch(r"onnx-.*int8\+tune.*", report["best"]["variant"])
    assert report["best"]["drop"] <= 1.0
    assert set(report["spent_s"]) == {"training", "building", "measuring"}
    assert report["spent_s"]["measuring"] > report["spent_s"]["training"] == 0
    rows = {row["variant"]: row for row in json.loads((folder / report["result"]).read_text())["rows"]}
    assert {"torch-fp32", "onnx-fp32", "onnx-int8", report["best"]["variant"]} <= set(rows)
    assert rows[report["best"]["variant"]]["artifact_id"] == report["best"]["artifact_id"]


@pytest.mark.slow
def test_candidates_get_exits_for_the_rest_of_the_allowed_drop(in_tune_folder, say, folder, monkeypatch):
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 0)  # the layers are smaller than an exit
    outcomes = {"": (0.1, 1.0), "-exits": (0.9, 1.5)}  # accuracy drop and speed-up, without and with exits
    measured = []

    def measure(judge, name, chain, candidate):
        ensure(judge.workspace, [name], chain, quiet)
        measured.append(name)
        drop, speedup = outcomes["-exits" if "-exits" in name else ""]
        return Outcome(name, "id", drop, speedup, speedup, 1000)

    monkeypatch.setattr(tuning._Judge, "_measure_variant", measure)
    workspace = Workspace.open("./decided", folder / "exported", train=TrainingSource("sentences.csv"))
    judge = tuning._Judge.open(workspace, tuning.Request("latency", 1.0, 1.0), quiet, no_bar)
    candidate = Candidate(50, epochs=1)
    outcome = judge.outcome(candidate)
    assert measured == ["onnx-pruned50-r1-int8+tune", "onnx-pruned50-r1-exits-int8+tune-drop90"]
    assert (outcome.variant, outcome.drop) == (measured[1], 0.9)
    assert outcome.without_exits.variant == measured[0]
    assert outcome.cost_without_exits("latency") == 1.0 > outcome.cost("latency")
    manifest = workspace.load("torch-pruned50-r1+tune").manifest
    assert manifest.step.exits == EXITS_WEIGHT
    for worse in ((1.1, 1.5), (0.9, 0.9)):
        outcomes["-exits"] = worse
        assert judge.outcome(candidate).variant == measured[0]
    del measured[:]
    for drop, objective in ((0.97, "latency"), (0.1, "size")):
        outcomes[""] = (drop, 1.0)
        other = replace(judge, request=tuning.Request(objective, 1.0, 1.0))
        assert other.outcome(candidate).variant == "onnx-pruned50-r1-int8+tune"
    assert len(measured) == 2


@pytest.fixture
def failing_int8(monkeypatch):
    """Makes validation fail for `onnx-int8` only."""

    def validate(workspace, variant, *arguments):
        report = original_validate(workspace, variant, *arguments)
        return {**report, "passed": report["passed"] and variant.name != "onnx-int8"}

    original_validate = pipeline.validate_artifact
    monkeypatch.setattr(pipeline, "validate_artifact", validate)


@pytest.mark.slow
def test_tune_continues_where_int8_fails_validation(in_tune_folder, say, folder, failing_int8):
    data = ("--train-data", "train.csv", "--data", "validation.csv")
    arguments = ("--model", "./decided", "--exported", "undecided", *data, "--budget", "1s")
    code, out, err = say("tune", *arguments, "--json")
    assert code == 0, err
    assert "onnx-int8 failed validation and was not published" in err
    assert "speed-ups refer to onnx-fp32" in err
    report = json.loads(out)
    assert report["best"]["variant"] == "onnx-int8-static+tune"
    assert {outcome["baseline"] for outcome in (report["best"], *report["front"])} == {"onnx-fp32"}
    names = {row["variant"] for row in json.loads((folder / report["result"]).read_text())["rows"]}
    assert names == {"torch-fp32", "onnx-fp32", *(outcome["variant"] for outcome in report["front"])}
    # `tune` does not build onnx-int8+tune, because this variant would equal onnx-int8.
    assert not list((folder / "undecided" / "decided").glob("onnx-int8+tune*"))
    code, out, err = say("tune", *arguments)
    assert code == 0, err
    assert "continuing from" in err
    assert "speed-up over onnx-fp32" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "soon"), 2, "not a duration"),
        (("--max-drop", "-1"), 2, "max-drop"),
        (("--data", "nowhere.csv"), 1, "no file nowhere.csv"),
        (("--train-data", "nowhere.csv"), 1, "no file nowhere.csv"),
    ],
)
def test_wrong_input_gives_an_error_before_the_search(in_tune_folder, say, monkeypatch, arguments, code, message):
    monkeypatch.setattr(tuning, "search", lambda *_: pytest.fail("it searched"))
    exit_code, _, err = say("tune", "--model", "./decided", *arguments)
    assert exit_code == code
    assert message in err


@pytest.mark.slow
def test_tune_exits_with_3_where_no_candidate_keeps_the_accuracy(in_tune_folder, say, monkeypatch):
    bad_outcome = World(slope=9).outcome(Candidate(90))
    monkeypatch.setattr("toolchain.tuning._Judge.outcome", lambda judge, candidate: bad_outcome)
    code, _, err = say("tune", "--model", "./decided", "--train-data", "train.csv", "--max-drop", 0.1, "--budget", "1s")
    assert code == 3
    assert "None of" in err
    assert "the smallest accuracy drop is" in err


@pytest.mark.slow
def test_tune_exits_with_3_where_no_candidate_passes_validation(in_tune_folder, say, monkeypatch):
    def refuse(judge, candidate):
        raise VerdictError("It failed validation.", "Nothing was published.")

    monkeypatch.setattr("toolchain.tuning._Judge.outcome", refuse)
    code, _, err = say("tune", "--model", "./decided", "--train-data", "train.csv", "--max-drop", 0.2, "--budget", "1s")
    assert code == 3
    assert re.search(
        r"None of (\d+) candidates has an accuracy drop of at most 0\.2 points; \1 failed validation\.", err
    )
    assert "A model that is trained longer or on more rows passes validation more often" in err


def open_latency_study(path):
    return open_study(path, "latency", 1.0, ["model", "train"], quiet)


def test_a_search_continues_after_a_kill_at_any_moment(tmp_path):
    """A kill leaves an incomplete last line, or a candidate that waits for its trial."""
    path = tmp_path / "study"
    outcome = Outcome("v", "id", 0.5, 1.5, 1.5, 1000)
    with open_latency_study(path) as study:
        trial, candidate = study.ask(baseline_candidate("latency"))
        study.tell(trial, candidate, outcome)
        study._study.enqueue_trial({"ratio": 50})
    content = path.read_bytes()
    for end in (len(content), content.rfind(b"\n", 0, -1) + 9):
        path.write_bytes(content[:end])
        with open_latency_study(path) as study:
            assert study.outcomes == {candidate: outcome}
            trial, other = study.ask(None)
            study.give_up(trial, other)
        with open_latency_study(path) as study:
            assert study.given_up == {other}


def test_an_outcome_with_exits_is_read_back(tmp_path):
    outcome = Outcome("v-exits", "id", 0.9, 2.0, 2.0, 1000, without_exits=Outcome("v", "id", 0.5, 1.5, 1.5, 1000))
    with open_latency_study(tmp_path / "study") as study:
        trial, candidate = study.ask(baseline_candidate("latency"))
        study.tell(trial, candidate, outcome)
    with open_latency_study(tmp_path / "study") as study:
        assert study.outcomes == {candidate: outcome}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"op_code"', b'"op"'),
        (b'"latency":1.5', b'"latency":0.0'),
        (b'"latency":1.5', b'"surprise":1.5'),
        (b'"param_name":"ratio"', b'"param_name":"rat"'),
        (b"{", b"["),
        (b"{", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b", "),
    ],
)
def test_a_damaged_search_is_refused(tmp_path, old, new):
    path = tmp_path / "study"
    with open_latency_study(path) as study:
        trial, candidate = study.ask(baseline_candidate("latency"))
        study.tell(trial, candidate, Outcome("v", "id", 0.5, 1.5, 1.5, 1000))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with (
        pytest.raises(ArtifactError, match=r"does not hold the trials of a search: .*Delete this file"),
        open_latency_study(path),
    ):
        pass
