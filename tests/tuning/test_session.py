"""Tests of `tune --session`: the decision, the search with invented times, the measurement, and the command."""

import json
import random
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.bench import run
from toolchain.bench.scenarios import QUICK
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.errors import BenchError, DataError, ResultFileError
from toolchain.progress import no_bar
from toolchain.results.session_file import (
    OBJECTIVES,
    Choice,
    Screened,
    SessionData,
    SessionFile,
    is_better,
    require_replaceable,
    save,
)
from toolchain.results.session_settings import AppSettings, SessionSettings, fixed_width
from toolchain.results.statistics import Ratio, ratio
from toolchain.system import hardware
from toolchain.tuning import session_search
from toolchain.tuning.session_measuring import Figures, Meter
from toolchain.tuning.session_search import Plan, _Search, combine, default_settings, list_alternatives, tune_session

ID = "0123456789abcdef" * 4
DEFAULT = AppSettings(4)
NO_ARENA = replace(DEFAULT, session=SessionSettings(memory_arena=False))


def quiet(*_):
    pass


def make_file(**fields):
    default = Choice(DEFAULT, DEFAULT)
    tried = Choice.from_comparison(DEFAULT, NO_ARENA, Ratio(1.5, 1.4, 1.6))
    values = {"latency": default, "throughput": default, "memory": tried, **fields}
    data = SessionData("sst2", "0" * 64, 872)
    return SessionFile("2026-01-01T00:00:00+00:00", "1", hardware.machine(), "m", "onnx-int8", ID, data, **values)


# The decision


@settings(deadline=None)
@given(st.integers(6, 16), st.floats(0.5, 2.0), st.floats(0.0, 0.3), st.integers(0, 10_000))
def test_settings_are_better_only_if_the_interval_excludes_1(rounds, gain, noise, seed):
    rng = random.Random(seed)
    base = [rng.uniform(90, 110) for _ in range(rounds)]
    other = [value / gain * rng.lognormvariate(0, noise) for value in base]
    compared = ratio(base, other)
    choice = Choice.from_comparison(DEFAULT, NO_ARENA, compared)
    assert choice.settings == (NO_ARENA if choice.ratio.low > 1 else DEFAULT)
    if noise == 0 and gain > 1.001:
        assert choice.settings == NO_ARENA
    if all(one >= two for one, two in zip(other, base, strict=True)):
        assert choice.settings == DEFAULT
    assert json.loads(json.dumps(asdict(choice)))["ratio"]["value"] == pytest.approx(compared.value, abs=1e-4)


def test_equal_settings_are_rarely_better():
    """The interval has 95 %, so noise alone makes at most about 2.5 % of equal settings look better."""
    rng = random.Random(3)
    wins = 0
    for _ in range(300):
        logs = [[rng.lognormvariate(0, 0.05) for _ in range(12)] for _ in range(2)]
        wins += is_better(ratio(*logs))
    assert wins <= 15


@settings(deadline=None)
@given(st.lists(st.floats(1, 1000), min_size=1, max_size=5))
def test_fewer_than_six_rounds_decide_nothing(base):
    assert not is_better(ratio(base, [value / 2 for value in base]))
    assert not is_better(None)


# The alternatives and their combination


@given(st.integers(1, 300))
def test_each_alternative_changes_one_factor_and_no_thread_is_added(cores):
    defaults = default_settings(cores)
    alternatives = list_alternatives(cores)
    assert len({each.settings for each in alternatives}) == len(alternatives)
    for each in alternatives:
        base = defaults["throughput"] if each.objectives == ("throughput",) else defaults["latency"]
        flat = [{**asdict(s), **asdict(s.session), "session": None} for s in (each.settings, base)]
        changed = {name for name in flat[0] if flat[0][name] != flat[1][name]}
        assert changed - {"inter_op_threads"} == {each.factor}
        assert 1 <= each.settings.threads <= cores
    assert cores > 1 or not {"threads", "spinning", "execution_mode"} & {each.factor for each in alternatives}


RATIOS = st.builds(
    lambda value, width: Ratio(value, value - width, value + width), st.floats(0.5, 2.0), st.floats(0.001, 0.4)
)


@given(st.lists(RATIOS, min_size=15, max_size=15), st.sampled_from(OBJECTIVES))
def test_a_combination_has_the_best_level_of_each_factor_that_looked_better(ratios, objective):
    alternatives = [each for each in list_alternatives(4) if objective in each.objectives]
    screened = [
        Screened(each.factor, objective, each.settings, compared)
        for each, compared in zip(alternatives, ratios, strict=False)
    ]
    default = default_settings(4)[objective]
    combined = combine(default, objective, screened)
    good = [each for each in screened if (each.ratio.value >= 1.01 if objective == "memory" else each.ratio.low > 1)]
    flat, base = ({**vars(each), **vars(each.session)} for each in (combined, default))
    for factor in {each.factor for each in screened}:
        if factor == "spinning" and combined.threads == 1:
            continue  # a single thread does not spin
        rivals = [each for each in good if each.factor == factor]
        if not rivals:
            assert flat[factor] == base[factor]
            continue
        best = max(rivals, key=lambda each: each.ratio.value).settings
        assert flat[factor] == {**vars(best), **vars(best.session)}[factor]
    other = next(name for name in OBJECTIVES if name != objective)
    assert combine(default, other, screened) == default


@given(st.integers(1, 512), st.sampled_from([128, 512]))
def test_fixed_padding_uses_few_widths(tokens, max_length):
    tokens = min(tokens, max_length)
    assert tokens <= fixed_width(tokens, max_length) <= max(16, min(2 * tokens, max_length))
    assert len({fixed_width(n, 512) for n in range(1, 513)}) == 6


# The search


class FakeMeter:
    """Invents figures: each changed setting multiplies the default figure by a factor, with noise."""

    def __init__(self, gains, noise=0.01, failing=lambda settings: False):
        self.gains, self.noise, self.failing, self.calls = gains, noise, failing, []

    def measure(self, needs, sentences, rounds, turn_s, rng):
        self.calls.append((list(needs), list(sentences)))
        figures = {each: Figures() for each in needs if not self.failing(each)}
        for each, found in figures.items():
            for objective in needs[each]:
                gain = self.gains(each, objective)
                count = 1 if objective == "memory" else rounds
                found.values[objective] += [100 / gain * rng.lognormvariate(0, self.noise) for _ in range(count)]
        return figures


@pytest.fixture
def make_search(monkeypatch, fake):
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    artifact = fake("m")

    def make(meter, budget_s=600.0, say=quiet):
        return _Search(artifact, meter, list(range(1000)), Plan(budget_s), say, quiet)

    return make


def gains(settings, objective):
    """Every setting that a test names is clearly better or worse than the default, so that noise decides nothing."""
    gain = {1: 0.9, 2: {"latency": 1.3, "throughput": 0.7, "memory": 1.0}[objective], 3: 0.9, 4: 1.0}[settings.threads]
    gain *= {"latency": 1.0, "throughput": 1.0, "memory": 1.5}[objective] if not settings.session.memory_arena else 1.0
    gain *= 1.2 if objective == "throughput" and settings.batch_size == 64 else 1.0
    return gain * (1.0 if settings.session.graph_optimization == "all" else 0.6)


def test_the_search_finds_the_best_settings_of_each_objective(make_search):
    meter = FakeMeter(gains)
    search = make_search(meter)
    screened = search.screen()
    screen_sentences = {i for _, sentences in meter.calls for i in sentences}
    meter.calls.clear()
    choices = search.confirm(screened)
    assert choices["latency"].settings.threads == 2
    assert choices["throughput"].settings.threads == 4
    assert choices["throughput"].settings.batch_size == 64
    assert choices["memory"].settings.session.memory_arena is False
    assert choices["latency"].ratio.value == pytest.approx(1.3, rel=0.05)
    assert len(meter.calls) == 12  # new processes in each round
    assert not screen_sentences & {i for _, sentences in meter.calls for i in sentences}
    assert all(settings.session.graph_optimization == "all" for settings in (c.settings for c in choices.values()))


def test_where_nothing_helps_the_default_stays(make_search):
    meter = FakeMeter(lambda *_: 1.0, noise=0.05)
    choices = make_search(meter)
    choices = choices.confirm(choices.screen())
    assert [choice.settings for choice in choices.values()] == list(default_settings(4).values())


def test_a_gain_of_the_screening_that_does_not_last_is_refused(make_search):
    search = make_search(FakeMeter(lambda *_: 1.0, noise=0.02))
    lucky = replace(DEFAULT, threads=2)
    choices = search.confirm([Screened("threads", "latency", lucky, Ratio(1.3, 1.2, 1.4))])
    assert choices["latency"].settings == DEFAULT
    assert choices["latency"].tried == lucky
    assert choices["memory"].ratio is None


def test_settings_that_fail_are_left_out_and_a_failing_default_is_an_error(make_search):
    search = make_search(FakeMeter(gains, failing=lambda settings: settings.threads == 2))
    choices = search.confirm(search.screen())
    assert choices["latency"].settings.threads == 4
    search = make_search(FakeMeter(gains, failing=lambda settings: settings == DEFAULT))
    with pytest.raises(BenchError, match="cannot be measured with default settings"):
        search.screen()


def test_the_budget_ends_both_parts(make_search, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class SlowMeter(FakeMeter):
        def measure(self, *arguments):
            clock[0] += 70
            return super().measure(*arguments)

    lines = []
    search = make_search(SlowMeter(gains), 100.0, lines.append)
    choices = search.confirm(search.screen())
    assert any("ended the screening after 8 of" in line for line in lines)
    assert any("ended the comparison after 1 of 12" in line for line in lines)
    assert [choice.settings for choice in choices.values()] == list(default_settings(4).values())
    assert Plan(1.0).turn_seconds(20) < 0.01 < Plan(1200.0).turn_seconds(20)


# The measurement


class ScriptedWorker:
    """Answers as a process does, records its messages, and fails if its arena is off."""

    made = ()

    def __init__(self, session, folder, place, encoder, text, imports):
        self.place, self.messages, self.closed = place, [], False
        ScriptedWorker.made += (self,)

    def load(self, timeout_s):
        if not self.place.settings.memory_arena:
            raise BenchError("The process crashed.")

    def ask(self, message, timeout_s):
        self.messages.append(message)
        if message["do"] == "memory":
            return {"bytes": 1000 * self.place.threads}
        return {"us": [[10 * len(batch) for batch in message.get("batches", [])]] * 2}

    def close(self):
        self.closed = True


def test_all_settings_run_the_same_sentences_and_are_weighed_first(built_tiny, monkeypatch):
    monkeypatch.setattr(ScriptedWorker, "made", ())
    monkeypatch.setattr("toolchain.tuning.session_measuring.SETTLE_S", 0)
    artifact, data = built_tiny.load("onnx-int8"), inputs.load_embedded()
    encoder = Encoder.open(artifact.path, [spec.name for spec in artifact.manifest.inputs], 512)
    lines = []
    meter = Meter(artifact, encoder, data, lines.append, ScriptedWorker)
    fixed, two = replace(DEFAULT, batch_size=8, padding="fixed"), replace(DEFAULT, threads=2)
    needs = {DEFAULT: OBJECTIVES, fixed: ("throughput",), two: OBJECTIVES, NO_ARENA: OBJECTIVES}
    figures = meter.measure(needs, list(range(300)), 3, 0.0, random.Random(0))
    assert set(figures) == {DEFAULT, fixed, two}
    assert "memory_arena=off cannot be measured: The process crashed." in lines[0]
    assert figures[DEFAULT].values == {"latency": [10.0] * 3, "throughput": [10.0] * 3, "memory": [4000]}
    assert figures[fixed].values == {"latency": [], "throughput": [10.0] * 3, "memory": []}
    workers = ScriptedWorker.made
    assert len(workers) == 3  # `fixed` shares the process of the default settings
    assert all(worker.closed for worker in workers)
    shared, other = (next(w.messages for w in workers if w.place.threads == n and w.messages) for n in (4, 2))
    assert [message["do"] for message in other[:3]] == ["data", "run", "memory"]
    assert other[1] == shared[1]
    singles = [
        [m["batches"] for m in each if m["do"] == "run" and len(m["batches"][0]) == 1] for each in (shared, other)
    ]
    assert singles[0][:1] == singles[1][:1]
    assert any(message.get("fixed") for message in shared)
    batched = [m["batches"] for m in shared if m.get("fixed")]
    assert max(map(len, batched[0])) == 8


# The file


def test_a_session_file_can_be_read_again_and_replaced(tmp_path):
    path = save(make_file(), tmp_path / "deep" / "s.json", replace=True)
    assert SessionFile.read(path) == make_file()
    require_replaceable(path)
    require_replaceable(tmp_path / "new.json")
    assert save(make_file(), path, replace=False).name == "s.2.json"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultFileError, match="exists and is not a session file"):
        require_replaceable(tmp_path / "notes.txt")
    with pytest.raises(ResultFileError, match="There is no session file"):
        SessionFile.read(tmp_path / "nothing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match="cannot be written"):
        save(make_file(), tmp_path / "file" / "s.json", replace=True)


def at(body, path, value):
    *folders, name = path
    for folder in folders:
        body = body[folder]
    body[name] = value


WRONG = [
    (["schema"], 2, "the schema is 2, but this program reads schema 1"),
    (["schema"], None, "schema"),
    (["surprise"], 1, "surprise"),
    (["artifact_id"], "../../etc", "artifact_id"),
    (["latency", "settings", "threads"], 0, "threads"),
    (["latency", "settings", "threads"], 10**9, "threads"),
    (["latency", "settings", "threads"], "2", "threads"),
    (["latency", "settings", "session", "memory_arena"], 1, "memory_arena"),
    (["latency", "settings", "session", "surprise"], 1, "surprise"),
    (["latency", "settings", "session", "graph_optimization"], "disabled", "graph_optimization"),
    (["latency", "settings", "session", "execution_mode"], "\x1b[2J", "execution_mode"),
    (["throughput", "settings", "batch_size"], 10**6, "batch_size"),
    (["throughput", "settings", "padding"], "left", "padding"),
    (["memory", "ratio", "low"], 0.9, "the settings do not follow from the ratio"),
    (["memory", "ratio"], None, "only given together"),
    (["latency", "settings", "batch_size"], 8, "the settings do not follow from the ratio"),
    (["variant"], "x" * 2000, "variant"),
    (["machine"], {}, "machine"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_a_wrong_session_file_is_refused(tmp_path, place, value, message):
    body = make_file().to_json()
    body = json.loads(json.dumps(body))
    at(body, place, value)
    (tmp_path / "s.json").write_text(json.dumps(body))
    with pytest.raises(ResultFileError) as caught:
        SessionFile.read(tmp_path / "s.json")
    assert message in caught.value.cause
    assert "tune --session" in caught.value.hint


# The command


@pytest.fixture
def short_search(monkeypatch):
    """Makes the search take seconds: two alternatives, and few short rounds."""
    names = ("memory_arena", "batch_size")
    monkeypatch.setattr(
        session_search,
        "list_alternatives",
        lambda cores: [each for each in list_alternatives(cores) if each.factor in names][:2],
    )
    monkeypatch.setattr(session_search, "Plan", partial(Plan, screen_rounds=2, confirm_rounds=1, turn_s=0.01))


def test_the_command_writes_the_settings_and_prints_them(built_tiny, short_search, say, tmp_path):
    output, results = tmp_path / "session.json", tmp_path / "results"
    model = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported, "--results", results)
    code, out, err = say("tune", "--session", "onnx-int8", *model, "--output", output, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed.pop("path") == str(output)
    assert printed == json.loads(output.read_text())
    result = SessionFile.read(output)
    assert result.artifact_id == built_tiny.load("onnx-int8").manifest.id
    assert result.latency.default.threads == hardware.cores()
    assert {each.factor for each in result.screened} == {"memory_arena", "batch_size"}
    assert not results.exists()
    code, out, err = say("tune", "--session", "onnx-int8", *model, "--budget", "1s")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[3:]] == list(OBJECTIVES)
    assert len(list((results / "local" / "sessions").glob("*-onnx-int8-*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--session", "onnx-int8", "--max-drop", "1"), 2, "--max-drop does not go with --session"),
        (("--session", "onnx-int8", "--objective", "size"), 2, "--objective does not go with --session"),
        (("--session", "onnx-int8", "--train-data", "t.csv"), 2, "--train-data does not go with --session"),
        (("--session", "onnx-int8", "--split", "train"), 2, "--split does not go with --session"),
        (("--output", "s.json"), 2, "--output needs --session"),
        (("--session", "torch-fp32"), 1, "does not run on ONNX Runtime"),
        (("--session", "onnx-fp16"), 1, "onnx-fp16 does not run on cpu"),
        (("--session", "onnx-int9"), 1, "onnx-int9"),
        (("--session", "onnx-int8", "--data", "nowhere.csv"), 1, "no file nowhere.csv"),
    ],
)
def test_wrong_options_are_refused_before_a_measurement(built_tiny, say, monkeypatch, arguments, code, message):
    monkeypatch.setattr(session_search, "Meter", lambda *_: pytest.fail("it measured"))
    model = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported)
    exit_code, _, err = say("tune", *arguments, *model)
    assert exit_code == code
    assert message in err


def test_another_file_is_not_replaced_and_few_rows_are_refused(built_tiny, say, tmp_path, monkeypatch):
    monkeypatch.setattr(session_search, "Meter", lambda *_: pytest.fail("it measured"))
    (tmp_path / "notes.txt").write_text("mine")
    model = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported)
    code, _, err = say("tune", "--session", "onnx-int8", *model, "--output", tmp_path / "notes.txt")
    assert code == 1
    assert "is not a session file" in err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "few.csv").write_text("sentence,label\n" + "good,1\nbad,0\n" * 5)
    request = run.Request(("onnx-int8",), ("cpu",), QUICK, str(tmp_path / "few.csv"))
    with pytest.raises(DataError, match="needs at least 20"):
        tune_session(built_tiny, request, Plan(1.0), quiet, no_bar)
