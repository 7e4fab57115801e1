"""Tests of `ship --session`: the settings of a session file in bundles, and the runners that use them."""

import importlib
import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from conftest import NODE, ROOT, TESTS, needs_node, verify_in_node
from hostile.bundles import reseal

from toolchain.backends import ort as backend
from toolchain.errors import ShippingError, VerdictError
from toolchain.progress import no_bar
from toolchain.results.session_file import Choice, SessionData, SessionFile, save
from toolchain.results.session_settings import AppSettings, SessionSettings
from toolchain.results.statistics import Ratio
from toolchain.ship import checking, shipping
from toolchain.ship.bundle_files import classify
from toolchain.ship.shipping import Order
from toolchain.system import hardware

TRITON = ROOT / "exported" / ".cache" / "test-clients" / "triton" / "bin" / "python"
TEXTS = ["a charming and often affecting journey .", "dull .", "a waste of two hours , and of a good cast .", "fine ."]
UNUSUAL = SessionSettings(
    spinning=False,
    execution_mode="parallel",
    inter_op_threads=2,
    graph_optimization="extended",
    memory_arena=False,
    memory_pattern=False,
)


def make_session(workspace, variant="onnx-int8", **fields):
    """Returns a session file that recommends unusual settings for every objective."""
    default = AppSettings(2)
    tried = replace(default, threads=1, session=UNUSUAL)
    ratio = Ratio(1.5, 1.4, 1.6)
    values = {
        "latency": Choice.from_comparison(default, tried, ratio),
        "throughput": Choice.from_comparison(
            replace(default, batch_size=32), replace(tried, batch_size=2, padding="fixed"), ratio
        ),
        "memory": Choice(default, default),
        "artifact_id": workspace.load(variant).manifest.id,
        **fields,
    }
    data = SessionData("sst2", "0" * 64, 872)
    return SessionFile(
        "2026-01-01T00:00:00+00:00",
        "1",
        hardware.machine(),
        workspace.model,
        variant,
        data=data,
        **values,
    )


@pytest.fixture(scope="module")
def ship(built_tiny, tmp_path_factory):
    """Returns a function that ships the tiny model with settings, once for each target and objective."""
    folders = {}

    def make(target, objective="throughput", names=("onnx-int8",), **options):
        key = target, objective, names, *options
        if key not in folders:
            folder = tmp_path_factory.mktemp("bundle") / "b"
            order = Order(names, target, demo=False, session=make_session(built_tiny), objective=objective, **options)
            with pytest.MonkeyPatch.context() as patch:  # other tests compare the tokenizers, which takes long
                patch.setattr("toolchain.ship.tokenizer_graph.comparison.difficult_texts", lambda: [])
                shipping.ship(built_tiny, order, folder, lambda line: None, no_bar)
            folders[key] = folder
        return folders[key]

    return make


def read_settings(folder):
    return json.loads((folder / "bundle.json").read_text())["models"][0].get("app_settings")


OPTIONS = (
    "intra_op_num_threads",
    "inter_op_num_threads",
    "execution_mode",
    "graph_optimization_level",
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
)


@pytest.mark.parametrize("name", ["classify", "classify_text", "classify_tokens"])
@pytest.mark.parametrize("settings", [AppSettings(1), AppSettings(1, UNUSUAL), AppSettings(3, UNUSUAL, 8, "fixed")])
def test_a_runner_sets_the_options_that_the_toolchain_measured(ship, monkeypatch, tmp_path, name, settings):
    if name == "classify_text":
        pytest.importorskip("onnxruntime_extensions")
    runner = importlib.import_module(f"toolchain.ship.bundle_files.{name}")
    monkeypatch.setattr(runner, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("TOOLCHAIN_THREADS", raising=False)
    stored = json.loads(json.dumps({"threads": settings.threads, "session": vars(settings.session)}))
    actual, measured = runner.session_options(stored), backend.session_options(settings.threads, settings.session)
    assert {key: getattr(actual, key) for key in OPTIONS} == {key: getattr(measured, key) for key in OPTIONS}
    if not settings.session.spinning:
        for key in backend.SPINNING:
            assert actual.get_session_config_entry(key) == measured.get_session_config_entry(key) == "0"


@pytest.mark.parametrize("name", ["classify", "classify_text", "classify_tokens"])
def test_a_file_of_a_large_machine_starts_few_threads_in_a_small_container(monkeypatch, tmp_path, name):
    if name == "classify_text":
        pytest.importorskip("onnxruntime_extensions")
    runner = importlib.import_module(f"toolchain.ship.bundle_files.{name}")
    monkeypatch.setattr(runner, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.delenv("TOOLCHAIN_THREADS", raising=False)
    settings = {"threads": 16, "session": vars(replace(UNUSUAL, inter_op_threads=16))}

    def counts():
        options = runner.session_options(settings)
        return options.intra_op_num_threads, options.inter_op_num_threads

    assert counts() == (4, 4)
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert counts() == (2, 2)
    monkeypatch.setenv("TOOLCHAIN_THREADS", "5")
    assert counts() == (5, 2)


def test_the_runner_splits_texts_and_answers_as_with_default_settings(ship, built_tiny, tmp_path):
    folder = ship("python")
    assert read_settings(folder) == {
        "threads": 1,
        "session": vars(UNUSUAL),
        "batch_size": 2,
        "padding": "fixed",
    }
    plain = tmp_path / "plain"
    shipping.ship(built_tiny, Order(("onnx-int8",), "python"), plain, lambda line: None, no_bar)
    assert read_settings(plain) is None
    runner, plain_runner = classify.Classifier(folder), classify.Classifier(plain)
    shapes = []
    session = runner._session

    class Recorder:
        def run(self, names, arrays, options):
            shapes.append(arrays["input_ids"].shape)
            return session.run(names, arrays, options)

    runner._session = Recorder()
    answers, expected = runner(TEXTS), [plain_runner([text])[0] for text in TEXTS]
    assert shapes == [(2, 16), (2, 16)]
    for answer, other in zip(answers, expected, strict=True):
        assert answer == pytest.approx(other, abs=0.2)  # the texts of a batch share the scales of int8
    assert runner([]) == plain_runner([]) == []


def test_an_argument_wins_over_the_settings(ship):
    """ONNX Runtime refuses to shrink an arena that does not exist."""
    assert read_settings(ship("python"))["session"]["memory_arena"] is False
    answers = [classify.Classifier(ship("python"), release_memory=release)(TEXTS) for release in (False, True)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("lengths", [[], [5], [5, 900, 7, 7, 6, 5, 300, 4]])
@pytest.mark.parametrize("size", [None, 1, 2, 100])
def test_every_text_is_in_one_batch(lengths, size):
    batches = classify.split(lengths, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches if size else ():
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 64 * size
        assert len(batch) <= size


@pytest.mark.slow
def test_a_text_runner_and_a_second_variant(ship):
    pytest.importorskip("onnxruntime_extensions")
    runner = importlib.import_module("toolchain.ship.bundle_files.classify_text")
    folder = ship("python", names=("onnx-fp32", "onnx-int8"), with_tokenizer=True)
    models = json.loads((folder / "bundle.json").read_text())["models"]
    assert ["app_settings" in model for model in models] == [False, True]
    assert checking.check_bundle(folder)[0].models[1].app_settings.session == UNUSUAL
    answers = runner.Classifier(folder, "onnx-int8")(TEXTS)
    assert [set(answer) for answer in answers] == [{"NEGATIVE", "POSITIVE"}] * 4


@pytest.mark.parametrize("objective", ["latency", "throughput", "memory"])
def test_golden_sentences_pass_with_the_settings_of_each_objective(ship, objective):
    record, models = checking.check_bundle(ship("python", objective))
    assert record.models[0].app_settings == make_choice(objective)
    assert models["onnx-int8"]["largest_delta"] <= models["onnx-int8"]["tolerance"]
    assert "### Settings of ONNX Runtime" in (ship("python", objective) / "README.md").read_text()


def make_choice(objective):
    changes = {"batch_size": 2, "padding": "fixed"} if objective == "throughput" else {}
    return AppSettings(2) if objective == "memory" else AppSettings(1, UNUSUAL, **changes)


@needs_node
def test_node_uses_the_settings(ship, tmp_path):
    folder = ship("web")
    assert len(verify_in_node(folder)) == 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    call = f"JSON.stringify(await sessionOptions(undefined, '{tmp_path}'))"
    code = f"import {{ sessionOptions }} from './node.mjs'; console.log({call})"
    environment = {name: value for name, value in os.environ.items() if name != "TOOLCHAIN_THREADS"}
    command = [NODE, "--input-type=module", "-e", code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    options = json.loads(run.stdout)
    spinning = {"allow_spinning": "0"}
    assert options.pop("extra")["session"].items() >= {"intra_op": spinning, "inter_op": spinning}.items()
    assert options == {
        "intraOpNumThreads": 1,
        "interOpNumThreads": 1,
        "executionMode": "parallel",
        "graphOptimizationLevel": "extended",
        "enableCpuMemArena": False,
        "enableMemPattern": False,
    }
    environment["TOOLCHAIN_THREADS"] = "2"
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["intraOpNumThreads"] == 2


def test_triton_gets_the_settings_for_which_it_has_parameters(ship):
    pytest.importorskip("onnxruntime_extensions")
    folder = ship("server")
    text = (folder / "repository" / "onnx-int8" / "config.pbtxt").read_text()
    for key, value in (
        ("intra_op_thread_count", 1),
        ("inter_op_thread_count", 2),
        ("execution_mode", 1),
        ("enable_mem_arena", 0),
        ("enable_mem_pattern", 0),
    ):
        assert f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' in text
    assert "optimization { graph { level: 1 } }" in text
    assert "intra_op_thread_count" not in (folder / "repository" / "tokenizer" / "config.pbtxt").read_text()
    assert 'cpu: "2"' in (folder / "inference-service.yaml").read_text()


@pytest.mark.skipif(not TRITON.exists(), reason="needs `make test-clients`")
def test_triton_reads_the_settings(ship):
    pytest.importorskip("onnxruntime_extensions")
    command = [TRITON, TESTS / "clients" / "triton.py", ship("server") / "repository"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    config = json.loads(run.stdout)["onnx-int8"]
    assert config["optimization"] == {"graph": {"level": 1}}
    assert config["parameters"]["intra_op_thread_count"] == {"string_value": "1"}
    assert config["parameters"]["execution_mode"] == {"string_value": "1"}


# Bad input


def test_a_file_of_another_artifact_is_refused(built_tiny, tmp_path):
    order = Order(("onnx-fp32",), "python", session=make_session(built_tiny))
    with pytest.raises(ShippingError, match="belongs to onnx-int8 with the id") as caught:
        shipping.ship(built_tiny, order, tmp_path / "b", lambda line: None, no_bar)
    assert "tune --session onnx-fp32" in caught.value.hint
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--target", "mobile", "--session", "s.json"), 2, "--session needs --target python, web or server"),
        (("--target", "other", "--session", "s.json"), 2, "--session needs --target python, web or server"),
        (("--target", "python", "--session-for", "memory"), 2, "--session-for needs --session"),
        (("--target", "python", "--session", "s.json", "--session-for", "size"), 2, "--session-for"),
        (("--target", "python", "--session", "nothing.json"), 1, "There is no session file nothing.json"),
        (("--target", "python", "--session", "s.json"), 1, "is not a valid session file"),
    ],
)
def test_wrong_options_are_refused(built_tiny, say, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text('{"schema": 1}')
    model = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported, "--output", tmp_path / "b")
    exit_code, _, err = say("ship", "onnx-int8", *arguments, *model)
    assert exit_code == code
    assert message in err
    assert not (tmp_path / "b").exists()


def test_the_command_ships_the_settings(built_tiny, say, tmp_path):
    path = save(make_session(built_tiny), tmp_path / "s.json", replace=True)
    model = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported, "--output", tmp_path / "b")
    code, out, err = say("ship", "onnx-int8", "--target", "python", "--session", path, *model, "--json")
    assert code == 0, err
    assert json.loads(out)["models"][0]["app_settings"] == {
        "threads": 1,
        "session": vars(UNUSUAL),
        "batch_size": None,
        "padding": "longest",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 10**9),
        ("threads", True),
        ("threads", None),
        ("batch_size", -1),
        ("padding", "left"),
        ("session", {}),
        ("session", []),
        ("session", {**vars(UNUSUAL), "memory_arena": "no"}),
        ("session", {**vars(UNUSUAL), "graph_optimization": "__class__"}),
        ("surprise", 1),
    ],
)
def test_verify_refuses_impossible_settings(ship, tmp_path, name, value):
    folder = tmp_path / "b"
    shutil.copytree(ship("python"), folder)
    body = json.loads((folder / "bundle.json").read_text())
    body["models"][0]["app_settings"][name] = value
    (folder / "bundle.json").write_text(json.dumps(body))
    reseal(folder)
    with pytest.raises(VerdictError, match=r"bundle\.json"):
        checking.check_bundle(folder)
