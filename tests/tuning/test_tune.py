"""The search finds what trying everything would find, wastes no training, and goes on where it was stopped."""

import itertools
import json
import re
import time
from dataclasses import replace

import pytest
from conftest import SHORT, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import tuning
from toolchain.artifacts.steps import Quantize
from toolchain.artifacts.variants import lineage
from toolchain.build import pipeline
from toolchain.cli.tune import Duration
from toolchain.errors import PruningError, VerdictError
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
    """What building and measuring would give: the more is pruned the faster and the worse, the more is trained the
    better. `slope` is the points lost a ratio, `gain` the share of these that training wins back. Fewer layers are a
    little worse and much faster."""

    def __init__(self, slope=0.05, gain=0.5):
        self.slope, self.gain, self.asked = slope, gain, []

    def __call__(self, candidate):
        self.asked.append(candidate)
        return self.outcome(candidate)

    def outcome(self, candidate):
        shallow = 100 - candidate.depth if candidate.ratio else 0
        lost = (self.slope * candidate.ratio + shallow / 200) * (1 - self.gain) ** candidate.epochs
        lost += 0.3 / (1 + candidate.keep_fp32) + (0.4 if candidate.embeddings == "int4" else 0)
        speed = 1 + candidate.ratio / 30 + shallow / 50 - 0.05 * candidate.keep_fp32
        size = 20 - candidate.ratio / 10 + candidate.keep_fp32 - (5 if candidate.embeddings == "int4" else 0)
        return Outcome(list(candidate.chain(6))[-1], "id", round(lost, 3), speed, speed, int(1e6 * size))


class Slow(World):
    """Trains each model once, 100 s an epoch by the `clock`; the rest takes `rest_s`."""

    def __init__(self, clock, rest_s=1, **world):
        super().__init__(**world)
        self.clock, self.rest_s, self.trained = clock, rest_s, set()

    def __call__(self, candidate):
        new = candidate.epochs and candidate.training not in self.trained
        self.clock[0] += 100 * candidate.epochs if new else self.rest_s
        self.trained |= {candidate.training} if candidate.epochs else set()
        return replace(super().__call__(candidate), training_s=100.0 * candidate.epochs)


def run(path, world, objective="latency", max_drop=1.0, seconds=60.0):
    with open_study(path, objective, max_drop, ["model", "train"], quiet) as study:
        search(study, world, time.monotonic() + seconds, quiet)
        return study.best, study.front, dict(study.outcomes)


def test_names_say_the_settings_and_share_what_is_the_same():
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
def test_the_starts_find_the_largest_ratio(slope, gain):
    world, over = World(slope, gain), {}
    while (candidate := next_start("latency", over, set(), 1.0)) is not None:
        assert candidate.training not in over
        over[candidate.training] = world.outcome(candidate).drop - 1.0

    def rungs(epochs):
        return [ratio for ratio in RATIOS if world.outcome(first_candidate("latency", ratio, epochs)).drop <= 1.0]

    found = max(ratio for (ratio, *_), excess in over.items() if excess <= 0 or ratio == 0)
    assert found == max(rungs(EPOCHS[-1]), default=0)
    climbed = len(rungs(EPOCHS[-1])) - len(rungs(EPOCHS[1]))
    assert len(over) <= 1 + len(RATIOS).bit_length() + climbed + 2 * len(EPOCHS[1:])


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
def test_only_what_cannot_win_is_hopeless(candidate, others):
    world = World()
    known = {other: world.outcome(other).drop <= 1.0 for other in others}
    if candidate in known or not is_hopeless("latency", candidate, known):
        return  # measured, or to be tried
    outcome = world.outcome(candidate)
    best = max((world.outcome(other).latency for other, kept in known.items() if kept), default=0)
    assert outcome.drop > 1.0 or outcome.latency <= best


@pytest.mark.parametrize("objective", ["latency", "throughput", "size"])
def test_no_two_candidates_mean_the_same(objective):
    names = [list(candidate.chain(6))[-1] for candidate in all_candidates(objective)]
    assert len(set(names)) == len(names) > 100


def test_the_search_finds_the_best_and_trains_only_what_could_win(tmp_path):
    world = World()
    best, front, outcomes = run(tmp_path / "study", world)
    everything = [
        Candidate(r, c, e, keep_fp32=k, depth=d)
        for r in RATIOS
        for d in DEPTHS
        for c in ("latency", "parameters")
        for e in EPOCHS
        for k in FP32_LAYERS
    ]
    kept = [world.outcome(candidate) for candidate in everything if world.outcome(candidate).drop <= 1.0]
    assert best.latency == max(outcome.latency for outcome in kept)
    assert len(world.asked) == len(set(world.asked)) == len(outcomes) < len(everything) / 2
    for index, candidate in enumerate(world.asked):
        if candidate.epochs:
            before = world.asked[:index]
            assert candidate.untrained in before
            assert world.outcome(candidate.untrained).drop > 1.0
            rivals = [world.outcome(c) for c in before if world.outcome(c).drop <= 1.0]
            assert all(world.outcome(candidate).latency > rival.latency for rival in rivals)
    drops, speeds = [o.drop for o in front], [o.latency for o in front]
    assert drops == sorted(drops)
    assert speeds == sorted(speeds)
    assert best in front


@pytest.mark.parametrize("objective", ["throughput", "size"])
def test_other_objectives(tmp_path, objective):
    best, _, outcomes = run(tmp_path / "study", World(), objective)
    kept = [outcome for outcome in outcomes.values() if outcome.drop <= 1.0]
    figure = {"throughput": lambda o: -o.throughput, "size": lambda o: o.size}[objective]
    assert figure(best) == min(map(figure, kept))


def test_what_was_measured_is_not_measured_again(tmp_path):
    first_run, second = World(), World()
    found = run(tmp_path / "study", first_run)
    again = run(tmp_path / "study", second)
    assert second.asked == []
    assert again == found
    other = World()
    run(tmp_path / "study", other, max_drop=2.0)
    assert other.asked


def test_what_an_older_release_tried_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "study"
    with monkeypatch.context() as older:
        older.setitem(SPACE, "latency", {**SPACE["latency"], "ratio": (0, 25)})
        with open_study(path, "latency", 1.0, ["model", "train"], quiet) as study:
            trial, candidate = study.ask(None)
            study.tell(trial, candidate, World().outcome(candidate))
        all_candidates.cache_clear()
    with open_study(path, "latency", 1.0, ["model", "train"], quiet) as study:
        assert study.outcomes == {}
        study.ask(None)


def test_near_the_limit_longer_training_comes_first_and_its_end_is_not_the_last():
    over = {first_candidate("latency", 0, 0).training: -1.0}

    for ratio, epochs, points in ((70, 1, 0.9), (70, 4, -0.1), (73, 4, 0.1)):
        candidate = next_start("latency", over, set(), 1.0)
        assert (candidate.ratio, candidate.epochs) == (ratio, epochs)
        over[candidate.training] = points


def test_what_is_trained_already_is_quantised_otherwise_before_more_is_trained(tmp_path):
    def lost(points):
        return Outcome("variant", "id", points, 2.0, 2.0, 1)

    near, far = (Candidate(ratio, "latency", 4, depth=67) for ratio in (73, 88))
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        assert study.nearest_trained(study.remaining) is None
        study.outcomes |= {far: lost(3.0), near: lost(1.05)}
        found = study.nearest_trained(study.remaining)
        assert found != near
        assert found.training == near.training
        study.outcomes[near] = lost(0.95)
        assert study.nearest_trained(study.remaining) is None


def test_what_is_kept_by_another_quantisation_is_climbed_from(tmp_path):
    def lost(points):
        return Outcome("variant", "id", points, 2.0, 2.0, 1)

    dynamic = first_candidate("latency", 70, 4)
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.outcomes |= {
            first_candidate("latency", 0, 0): lost(0.1),
            first_candidate("latency", 70, 1): lost(1.9),
            dynamic: lost(1.25),
        }
        assert next_start("latency", study.excess_drops, set(), 1.0).ratio < 70
        study.outcomes[replace(dynamic, scheme="static")] = lost(0.7)
        assert next_start("latency", study.excess_drops, set(), 1.0) == first_candidate("latency", 73, 4)
        # What dynamic int8 lost at 70 % rules it out at 73 %.
        assert _choose_start(study, study.remaining) == replace(first_candidate("latency", 73, 4), scheme="static")


def test_what_is_trained_already_always_fits_the_time(tmp_path):
    trained = Candidate(70, "latency", 4, depth=67)
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.outcomes[trained] = Outcome("variant", "id", 1.25, 2.0, 2.0, 1, training_s=4000.0)
        fitting = _fit_in_time(study, study.remaining, remaining_s=60.0)
        assert {candidate.training for candidate in fitting if candidate.epochs} == {trained.training}
        study.trained.add((67, "latency", 67, 4))  # by another release, which measured another graph of it
        fitting = _fit_in_time(study, study.remaining, remaining_s=60.0)
        assert {candidate.training for candidate in fitting if candidate.epochs} == {trained.training, *study.trained}


def test_what_is_trained_already_comes_first_where_the_next_does_not_fit(tmp_path, monkeypatch):
    clock = [0.0]
    world, there = Slow(clock), first_candidate("latency", 73, 4)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, ["model", "train"], quiet) as study:
        study.trained.add(there.training)
        world.trained.add(there.training)
        search(study, world, 110.0, quiet)
    asked = [candidate for candidate in world.asked if candidate.epochs]
    assert asked[:2] == [next_start("latency", {first_candidate("latency", 0, 0).training: -1.0}, set(), 1.0), there]
    assert {candidate.training for candidate in asked[1:]} == {there.training}


def test_a_stopped_search_takes_up_what_it_had_begun(tmp_path):
    class Stopped(World):
        def __call__(self, candidate):
            if candidate.epochs:
                self.stopped = candidate
                raise KeyboardInterrupt
            return super().__call__(candidate)

    world, rest = Stopped(), World()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study", world)
    found = run(tmp_path / "study", rest)[0]
    assert rest.asked[0] == world.stopped
    assert not set(world.asked) & set(rest.asked)
    assert found.latency == run(tmp_path / "other", World())[0].latency


def test_no_time_is_no_training(tmp_path, monkeypatch):
    """The first training says how long the next takes; what does not fit is left for the next run."""
    clock = [0.0]
    world, rest = Slow(clock), Slow(clock)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, world, 150.0, quiet)
    assert len(world.trained) == 1
    assert clock[0] == 150  # what needs no training is still measured
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, rest, clock[0] + 1000, quiet)
    assert any(candidate.epochs for candidate in rest.asked)
    assert not set(world.asked) & set(rest.asked)


def test_a_shorter_training_takes_the_place_of_one_that_does_not_fit(tmp_path, monkeypatch):
    clock = [0.0]
    world = Slow(clock, rest_s=0, gain=0.2)
    monkeypatch.setattr("toolchain.tuning.time.monotonic", lambda: clock[0])
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        known = {}
        while (start := next_start("latency", known, set(), 1.0)) and start.epochs < 2:
            known[start.training] = world.outcome(start).drop - 1.0
        longest = 100 * sum(bool(epochs) for *_, epochs in known) + 150
        said = []
        search(study, world, longest, lambda event: said.append(str(event)))
    trained = [candidate for candidate in world.asked if candidate.epochs]
    assert start is not None
    assert {candidate.epochs for candidate in trained} == {1}
    assert longest - 100 < clock[0] <= longest
    assert said[-1].startswith("no time is left to train")


def test_a_ratio_the_model_does_not_have_is_given_up(tmp_path):
    class Narrow(World):
        def __call__(self, candidate):
            if candidate.ratio > 60:
                refused.append(candidate)
                raise PruningError("Nothing is left.", "Prune less.")
            return super().__call__(candidate)

    refused = []
    best, _, outcomes = run(tmp_path / "study", Narrow(slope=0.001))
    assert max(candidate.ratio for candidate in outcomes) == 60
    # Once in vain, and no such ratio or a higher one again.
    assert not [(one, other) for one, other in itertools.combinations(refused, 2) if other.prunes_as_much_as(one)]
    assert best.latency == World(slope=0.001).outcome(Candidate(60, depth=50)).latency


def test_what_fails_validation_may_pass_it_when_trained(tmp_path):
    class Uncertain(World):
        def __call__(self, candidate):
            if candidate.ratio >= 80 and not candidate.epochs:
                self.asked.append(candidate)
                raise VerdictError("It failed validation.", "Nothing was published.")
            return super().__call__(candidate)

    world = Uncertain(gain=0.9)
    best, _, outcomes = run(tmp_path / "study", world)
    assert best.latency == run(tmp_path / "other", World(gain=0.9))[0].latency
    assert any(candidate.ratio >= 80 for candidate in outcomes)
    assert len(world.asked) == len(set(world.asked))


def test_where_int8_fails_validation_others_are_tried_and_pruned_alike(tmp_path):
    class Undecided(World):
        def __call__(self, candidate):
            if len(self.asked) == 8:
                raise KeyboardInterrupt
            self.asked.append(candidate)
            if candidate.scheme == "dynamic" and not candidate.keep_fp32:
                raise VerdictError("It failed validation.", "Nothing was published.")
            return self.outcome(candidate)

    world = Undecided()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study", world)
    plain, *others = world.asked
    assert plain == first_candidate("latency", 0, 0)
    assert others[0] == replace(plain, scheme="static")
    assert all(candidate.ratio and candidate.scheme == "static" for candidate in others[1:])


def test_what_failed_validation_is_known_to_the_next_run(tmp_path):
    def refuse(candidate):
        raise VerdictError("It failed validation.", "Nothing was published.")

    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        search(study, refuse, time.monotonic() + 0.3, quiet)
        refused = set(study.refused)
    with open_study(tmp_path / "study", "latency", 1.0, [], quiet) as study:
        assert study.refused == refused
    assert first_candidate("latency", 0, 0) in refused


@pytest.mark.parametrize("objective", ["latency", "throughput", "size"])
def test_one_candidate_is_quantised_as_the_baseline(objective):
    step = baseline_candidate(objective).steps(6)[-1]
    assert step == Quantize()


def test_durations():
    kind = Duration()
    assert [kind.convert(text, None, None) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
    for wrong in ("20", "m", "-1m", "0m", "20 m", "1d"):
        with pytest.raises(Exception, match="not a duration"):
            kind.convert(wrong, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, data, and room for what is built."""
    folder = tmp_path_factory.mktemp("tune")
    words = ["good", "bad", "film", "dull", "bright", "a", "the", "story"]
    rows = [f"{' '.join(words[(i * k) % 8] for k in range(1, 4 + i % 9))},1" for i in range(120)]
    for name in ("train.csv", "validation.csv"):
        (folder / name).write_text("sentence,label\n" + "\n".join(rows) + "\n")
    make_checkpoint(folder / "decided", leaning=30)
    return folder


@pytest.fixture
def at(folder, monkeypatch, short_bench):
    """The working directory is `folder`, and measurements are short."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tuning, "PROTOCOL", SHORT)
    monkeypatch.setattr("toolchain.bench.roofline.rates", lambda *_: {})


def test_the_command_line_builds_measures_and_says_which(at, say, folder):
    arguments = ("--model", "./decided", "--train-data", "train.csv", "--data", "validation.csv", "--budget", "1s")
    code, out, err = say("tune", *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["best"]["variant"] in [outcome["variant"] for outcome in found["front"]]
    assert re.fullmatch(r"onnx-.*int8\+tune.*", found["best"]["variant"])
    assert found["best"]["drop"] <= 1.0
    rows = {row["variant"]: row for row in json.loads((folder / found["result"]).read_text())["rows"]}
    assert {"torch-fp32", "onnx-fp32", "onnx-int8", found["best"]["variant"]} <= set(rows)
    assert rows[found["best"]["variant"]]["artifact_id"] == found["best"]["artifact_id"]


@pytest.fixture
def int8_fails(monkeypatch):
    """Validation says no to `onnx-int8`, and only to that."""

    def judged(workspace, variant, *others):
        report = judge(workspace, variant, *others)
        return {**report, "passed": report["passed"] and variant.name != "onnx-int8"}

    judge = pipeline._validate
    monkeypatch.setattr(pipeline, "_validate", judged)


def test_the_search_goes_on_where_int8_fails_validation(at, say, folder, int8_fails):
    data = ("--train-data", "train.csv", "--data", "validation.csv")
    arguments = ("--model", "./decided", "--exported", "undecided", *data, "--budget", "1s")
    code, out, err = say("tune", *arguments, "--json")
    assert code == 0, err
    assert "onnx-int8 failed validation and was not published" in err
    assert "speed-ups refer to onnx-fp32" in err
    found = json.loads(out)
    assert found["best"]["variant"] == "onnx-int8-static+tune"
    assert {outcome["baseline"] for outcome in (found["best"], *found["front"])} == {"onnx-fp32"}
    names = {row["variant"] for row in json.loads((folder / found["result"]).read_text())["rows"]}
    assert names == {"torch-fp32", "onnx-fp32", *(outcome["variant"] for outcome in found["front"])}
    assert not list((folder / "undecided" / "decided").glob("onnx-int8+tune*"))  # the same as onnx-int8
    code, out, err = say("tune", *arguments)
    assert code == 0, err
    assert "continuing from" in err
    assert "speed-up over onnx-fp32" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--budget", "soon"), 2, "not a duration"),
        (("--max-drop", "-1"), 2, "max-drop"),
        (("--data", "nowhere.csv"), 1, "no file nowhere.csv"),
        (("--train-data", "nowhere.csv"), 1, "no file nowhere.csv"),
    ],
)
def test_wrong_input_is_told_before_anything_is_searched(at, say, monkeypatch, arguments, code, said):
    monkeypatch.setattr(tuning, "search", lambda *_: pytest.fail("it searched"))
    got, _, err = say("tune", "--model", "./decided", *arguments)
    assert got == code
    assert said in err


def test_nothing_that_keeps_the_accuracy_is_a_no(at, say, monkeypatch):
    bad = World(slope=9).outcome(Candidate(90))
    monkeypatch.setattr("toolchain.tuning._Judge.outcome", lambda judge, candidate: bad)
    code, _, err = say("tune", "--model", "./decided", "--train-data", "train.csv", "--max-drop", 0.1, "--budget", "1s")
    assert code == 3
    assert "None of" in err
    assert "the smallest drop is" in err


def test_nothing_that_passes_validation_is_a_no(at, say, monkeypatch):
    def refuse(judge, candidate):
        raise VerdictError("It failed validation.", "Nothing was published.")

    monkeypatch.setattr("toolchain.tuning._Judge.outcome", refuse)
    code, _, err = say("tune", "--model", "./decided", "--train-data", "train.csv", "--max-drop", 0.2, "--budget", "1s")
    assert code == 3
    assert re.search(
        r"None of (\d+) candidates has an accuracy drop of at most 0\.2 points; \1 failed validation\.", err
    )
    assert "longer or on more rows" in err
