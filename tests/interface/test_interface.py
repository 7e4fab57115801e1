"""Tests of the Python interface: what importing it loads, its public names, its errors, and interrupts."""

import configparser
import inspect
import json
import signal
import subprocess
import sys
import types

import click
import pytest
from conftest import ROOT
from sample_results import FP32, INT8, result, row
from test_imports import HEAVY

import toolchain as tc
from toolchain import interface
from toolchain.artifacts.steps import Quantize
from toolchain.build import pipeline
from toolchain.cli import cli
from toolchain.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    ResultFileError,
    SettingsError,
    UnknownVariantError,
)
from toolchain.interface import progress
from toolchain.interface.calls import ARGUMENTS, RENAMED, calling, to_python_words

IMPORT = """
import sys, time
before, start = set(sys.modules), time.process_time()
import toolchain
seconds = time.process_time() - start
import json
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


@pytest.fixture
def model(tiny):
    return tc.open(tiny.model, exported=tiny.exported, results=tiny.exported / "results", progress=False)


@pytest.fixture
def measured(tmp_path):
    (tmp_path / "result.json").write_text(result(FP32, INT8).to_json())
    return tc.read_result(tmp_path / "result.json")


def test_importing_the_package_is_fast_and_loads_nothing_heavy():
    runs = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        runs.append(json.loads(run.stdout))
    assert min(seconds for seconds, _ in runs) < 0.1
    modules = set(runs[0][1])
    assert not {name.split(".")[0] for name in modules} & (HEAVY | {"click", "tqdm", "pydantic"})
    assert {name for name in modules if name.startswith("toolchain")} == {"toolchain"}


def test_the_public_names_load_when_they_are_first_used():
    assert set(tc.__all__) <= set(dir(tc))
    assert tc.__all__ == interface.__all__
    assert all(getattr(tc, name) is getattr(interface, name) for name in tc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        _ = tc.opne


def test_type_checkers_find_the_types():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["toolchain"].split()
    assert (ROOT / "toolchain" / "py.typed").exists()


# The arguments of the public functions and methods, positional ones before the *. Later releases may add arguments with
# a default value. To remove or rename an argument, follow the rule in docs/reference/python.md.
PUBLIC = {
    "Classifier": "source * threads",
    "Classifier.__call__": "texts *",
    "Classifier.close": "*",
    "Comparison.plot": "y x *",
    "Comparison.save": "path *",
    "Comparison.to_pandas": "*",
    "Model.bench": "variants * quick provider data text_column text_pair_column label_column split threads batch_size "
    "by_length service_times device_id allow_fallback save_as force resume",
    "Model.build": "variant *",
    "Model.exits": "parent * layers max_drop name",
    "Model.finetune": "output * epochs lr batch_size max_length labels multi_label regression entities teacher seed "
    "data revision",
    "Model.export": "parent * optimize no_pass opset exporter revision base name",
    "Model.prune": "ratio * max_drop method cost layers embedding_rank recover exits parent name",
    "Model.quantize": "parent * backend scheme isa embeddings keep_fp32 max_drop no_pass trim_vocab name",
    "Model.result": "*",
    "Model.ship": "variants * target output license demo with_tokenizer exit_confidence",
    "Model.variants": "*",
    "Result.compare": "baseline * filter provider sort",
    "Result.plot": "y x *",
    "Result.to_pandas": "baseline *",
    "open": "model * exported folder train_data text_column text_pair_column label_column split results progress",
    "read_result": "paths * exported",
    "verify": "bundle * id key root_certificate",
}


def arguments_of(name):
    function = tc
    for part in name.split("."):
        function = getattr(function, part)
    parameters = list(inspect.signature(function).parameters.values())
    return [each for each in parameters if each.name != "self"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_arguments_keep_their_names_and_places(name):
    positional, _, keyword = PUBLIC[name].partition("*")
    now = arguments_of(name)
    named_now = [each.name for each in now if each.kind is each.KEYWORD_ONLY]
    assert [each.name for each in now if each.kind is not each.KEYWORD_ONLY] == positional.split()
    assert set(keyword.split()) <= set(named_now)
    added = [each for each in now if each.name in set(named_now) - set(keyword.split())]
    assert all(each.default is not each.empty for each in added)


COMMANDS = ("finetune", "export", "prune", "quantize", "exits", "bench", "compare", "ship", "verify", "variants")
# Options for which the interface has no argument. Some of them are for a terminal.
ONLY_COMMANDS = {"json", "debug", "dry-run", "format", "sensitivity", "engine", "address"}
ONLY_COMMANDS |= {"max-p95-ms", "max-size-mb", "max-memory-mb", "against", "max-regression", "plots"}
ONLY_COMMANDS |= {"scenario", "p99-ms", "qps", "ort-mobile", "session", "session-for", "sign", "certificate"}
ONLY_COMMANDS |= {"push", "public", "variant"}


def test_messages_name_arguments_that_exist():
    arguments = {argument.name for name in PUBLIC for argument in arguments_of(name)}
    assert set(ARGUMENTS.values()) <= arguments
    options = {
        option.opts[0].removeprefix("--")
        for name in COMMANDS
        for option in cli.commands[name].params
        if isinstance(option, click.Option)
    }
    assert options == set(ARGUMENTS) | ONLY_COMMANDS
    assert not set(ARGUMENTS) & ONLY_COMMANDS
    assert set(RENAMED) <= options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Leave --keep-fp32 out.", "Leave `keep_fp32` out."),
        ("Give one of --from and --max-drop.", "Give one of `parent` and `max_drop`."),
        ("Use --sensitivity.", "Use --sensitivity."),
        ("The file my--name.csv is empty.", "The file my--name.csv is empty."),
        ("Measure with `toolchain bench`.", "Measure with `model.bench()`."),
        ("Use `toolchain export --base ID`.", "Use `toolchain export --base ID`."),
    ],
)
def test_messages_use_the_words_of_the_interface(text, expected):
    assert to_python_words(text) == expected


WRONG_CALLS = [
    (lambda model: model.quantize("onnx-fp23"), UnknownVariantError, "Did you mean onnx-fp32"),
    (lambda model: model.quantize("onnx-int8"), UnknownVariantError, "It takes an fp32 graph .* \\(`backend` ort\\)"),
    (lambda model: model.quantize(backend="orts"), SettingsError, "no `backend` 'orts'. Did you mean 'ort'"),
    (lambda model: model.quantize(scheme="int8"), SettingsError, "no `scheme` 'int8'"),
    (lambda model: model.quantize(isa="avx"), SettingsError, "no `isa` 'avx'"),
    (lambda model: model.quantize(embeddings="int2"), SettingsError, "Did you mean 'int4'|Did you mean 'int8'"),
    (lambda model: model.quantize(keep_fp32=0), SettingsError, "`keep_fp32` is 0, but it must be a whole number"),
    (lambda model: model.quantize(keep_fp32=1, max_drop=1), SettingsError, "`keep_fp32` and `max_drop` exclude"),
    (lambda model: model.quantize(scheme="fp16", name="x", trim_vocab="train"), SettingsError, "`scheme` fp16 cannot"),
    (lambda model: model.quantize(no_pass="smooth"), SettingsError, "`no_pass` names a pass"),
    (lambda model: model.quantize(name="Small"), SettingsError, "`name` is 'Small'"),
    (lambda model: model.quantize(trim_vocab="missing.txt"), DataError, "There is no file missing.txt"),
    (lambda model: model.quantize(3), SettingsError, "3 is not a variant"),
    (lambda model: model.prune(), SettingsError, "needs either `ratio` or `max_drop`"),
    (lambda model: model.prune("0.5"), SettingsError, "`ratio` is '0.5', but it must be a number from 0 to 1"),
    (lambda model: model.prune(0.555), SettingsError, "`ratio` 0.555 is not a multiple of 0.01"),
    (
        lambda model: model.prune(0.5, method="mask", layers=1),
        SettingsError,
        "Leave `layers`, `cost` and `embedding_rank` out",
    ),
    (lambda model: model.prune(0.5, embedding_rank=0), SettingsError, "`embedding_rank` is 0, but it must be a whole"),
    (lambda model: model.prune(0.5, exits=True), SettingsError, "Give `recover` too"),
    (lambda model: model.prune(0.5, recover=0), SettingsError, "`recover` is 0"),
    (lambda model: model.prune(0.5, cost="energy"), SettingsError, "no `cost` 'energy'"),
    (lambda model: model.exits(layers=[2, 1]), SettingsError, "`layers` needs different numbers"),
    (lambda model: model.export(optimize="gpu"), SettingsError, "no `optimize` 'gpu'"),
    (lambda model: model.export(no_pass="smooth"), SettingsError, "`no_pass` names a pass that `optimize` cpu"),
    (lambda model: model.export(opset=5), SettingsError, "`opset` is 5"),
    (lambda model: model.exits(layers=["1"]), SettingsError, "`layers` is '1', but it must be a whole number"),
    (lambda model: model.finetune("out", epochs=0), SettingsError, "`epochs` is 0"),
    (lambda model: model.finetune("out", lr=0), SettingsError, "`lr` is 0, but it must be a number"),
    (lambda model: model.finetune("out", seed=-1), SettingsError, "`seed` is -1"),
    (lambda model: model.finetune("out", max_length=4), SettingsError, "`max_length` is 4"),
    (lambda model: model.finetune("out", labels=["a", "a"]), SettingsError, "a name twice"),
    (lambda model: model.finetune("out", regression=True, entities=True), SettingsError, "exclude each other"),
    (lambda model: model.finetune("out", revision="v1"), CheckpointError, "v1|revision"),
    (lambda model: model.bench(5), SettingsError, "5 is not a variant"),
    (lambda model: model.bench([]), SettingsError, "The list of variants is empty"),
    (lambda model: model.bench("onnx-int8", provider="gpu"), SettingsError, "no `provider` 'gpu'"),
    (lambda model: model.bench("onnx-int8", force=True), SettingsError, "`force` needs `save_as`"),
    (lambda model: model.bench("onnx-int8", save_as="a/b"), SettingsError, "Give a name, not a path"),
    (lambda model: model.bench("onnx-int8", resume=True), ResultFileError, "interrupted"),
    (lambda model: model.ship([], target="web"), SettingsError, "The list of variants is empty"),
    (lambda model: model.ship("onnx-int8", target="browser"), SettingsError, "no `target` 'browser'"),
    (lambda model: tc.verify("bundle", id="12"), SettingsError, "64 hexadecimal digits"),
    (lambda model: tc.verify("bundle", key="a", root_certificate="b"), SettingsError, "exclude each other"),
    (lambda model: tc.read_result(), SettingsError, "no result file to read"),
    (lambda model: tc.Classifier("onnx-int8"), SettingsError, "is not a folder. Give an artifact"),
    (lambda model: tc.Classifier(model.folder), ArtifactError, "has no manifest.json"),
    (lambda model: tc.Classifier(None), SettingsError, "None is not an artifact"),
    (lambda model: tc.open("./no-such-model"), CheckpointError, "./no-such-model"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG_CALLS)
def test_a_wrong_call_gives_one_sentence_in_the_words_of_the_interface(call, kind, message, model):
    with pytest.raises(kind, match=message) as error:
        call(model)
    assert isinstance(error.value, tc.ToolchainError)
    assert not {f"--{option}" for option in ARGUMENTS} & set(str(error.value).replace(",", " ").split())
    assert str(error.value) == f"{error.value.cause} {error.value.hint}".strip()


def test_wrong_calls_of_a_result(measured, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"no `y` 'acuracy'\. Did you mean 'accuracy'"):
        measured.plot("acuracy", "latency")
    with pytest.raises(SettingsError, match="`y` and `x` are both 'size'"):
        measured.plot("size", "size")
    with pytest.raises(SettingsError, match="no `sort` 'speed'"):
        measured.compare(sort="speed")
    with pytest.raises(ResultFileError, match="No row is the baseline 'bnb-int8'"):
        measured.compare(baseline="bnb-int8")
    with pytest.raises(SettingsError, match=r"no `ending` '.xlsx'"):
        measured.compare().save(tmp_path / "report.xlsx")
    with pytest.raises(ResultFileError, match=r"ends in .svg or .png"):
        measured.plot().save(tmp_path / "plot.pdf")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(tc.ToolchainError, match="Install it with `pip install pandas`"):
        measured.to_pandas()


def test_an_artifact_of_another_model_is_refused(model, built_tiny):
    with pytest.raises(SettingsError, match="is an artifact of another model"):
        model.bench(built_tiny.load("onnx-int8"))


def test_a_call_and_a_command_build_the_same_variant(model, tiny, say):
    options = ["--no-pass", "quantize-embedding", "--name", "tables"]
    artifact = model.quantize(model.build("onnx-fp32"), no_pass="quantize-embedding", name="tables")
    assert isinstance(artifact.manifest.step, Quantize)
    assert repr(artifact).startswith("<Artifact onnx-int8+tables, ")
    code, out, err = say("quantize", *options, "--dry-run", "--model", tiny.model, "--exported", tiny.exported)
    assert code == 0, err
    assert "\nonnx-int8+tables: skip (fresh)" in out
    assert {item.variant: item.state for item in model.variants()}["onnx-int8+tables"] == "built"


def test_finetune_returns_a_model_with_the_labels_and_the_data_of_its_training(tiny, tmp_path, say):
    rows = "".join(f"a {('dull', 'fine')[i % 2]} film {i},{('blame', 'praise')[i % 2]}\n" for i in range(60))
    (tmp_path / "films.csv").write_text(f"text,label\n{rows}")
    data, exported = tmp_path / "films.csv", tiny.exported
    base = tc.open(tiny.model, exported=exported, train_data=data, results=exported / "results", progress=False)
    model = base.finetune(tmp_path / "films", epochs=1, batch_size=8)
    assert repr(model) == f"<Model films, in {exported / 'films'}>"
    with tc.Classifier(model.prune(0.5), threads=1) as classifier:
        assert classifier.labels == ("blame", "praise")
    with pytest.raises(ArtifactError, match="choose another folder with `output`"):
        base.finetune(tmp_path / "films", epochs=2, batch_size=8)
    # The command with the same settings has nothing to train.
    options = ["--base", tiny.source.ref, "--train-data", data, "--output", tmp_path / "films"]
    code, _, err = say("finetune", *options, "--epochs", 1, "--batch-size", 8)
    assert code == 0, err
    assert "unchanged" in err


@pytest.mark.slow
def test_calls_lead_from_a_checkpoint_to_a_bundle(tiny, tmp_path, short_bench):
    pandas = pytest.importorskip("pandas")
    rows = [f"a {('dull', 'fine')[i % 2]} film of {i} words,{i % 2}" for i in range(60)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *rows]))
    data, results = tmp_path / "films.csv", tmp_path / "results"
    model = tc.open(tiny.source.ref, exported=tiny.exported, train_data=data, results=results, progress=False)
    int8 = model.quantize("onnx-fp32")
    pruned = model.export(model.prune(0.5, recover=1))
    names = ["torch-fp32", "onnx-int8", "onnx-pruned50-r1"]
    result = model.bench(["torch-fp32", int8, pruned], provider="cpu", quick=True, data=data)
    comparison = result.compare(baseline="torch-fp32")
    text = str(comparison)
    assert all(f"{name}@cpu" in text for name in names)
    assert "Ratios are against torch-fp32@cpu" in text
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert sorted(frame["variant"]) == sorted(names)
    result.plot("accuracy", "latency").save(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    with tc.Classifier(int8) as classifier:
        answers = classifier(["a charming film", "an utter waste of time"])
    assert {answer.label for answer in answers} <= {"NEGATIVE", "POSITIVE"}
    bundle = model.ship([int8], target="web", output=tmp_path / "web", demo=False)
    assert tc.verify(bundle)
    with tc.Classifier(bundle) as classifier:
        assert [each.label for each in classifier([each.text for each in answers])] == [each.label for each in answers]


def test_a_classifier_answers_texts_and_releases_its_model(model):
    with tc.Classifier(model.folder / "onnx-int8", threads=1) as classifier:
        assert classifier.labels == ("NEGATIVE", "POSITIVE")
        one = classifier("a charming film")
        several = classifier(["a charming film", ("a charming film", "and long")])
        assert several[0].label == one.label == max(one.probabilities, key=one.probabilities.get)
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert several[1].text == ("a charming film", "and long")
        assert classifier([]) == []
        for item in (3, None, ("a", "b", "c"), ("a", 1)):
            with pytest.raises(DataError, match=r"Item 2 is .*, which is not a text"):
                classifier(["a", item])
        with pytest.raises(DataError, match="half of a surrogate pair"):
            classifier("\ud800")
    assert repr(classifier).endswith(", closed>")
    with pytest.raises(SettingsError, match="The classifier is closed"):
        classifier("a film")
    classifier.close()
    with pytest.raises(DataError), tc.Classifier(model.build("onnx-int8")) as classifier:
        classifier(5)
    assert repr(classifier).endswith(", closed>")


def test_a_notebook_shows_no_markup_of_a_result_file(tmp_path):
    data = {"name": "<script>alert(1)</script>", "rows": 10, "sha256": "0"}
    (tmp_path / "result.json").write_text(result(row(), data=data).to_json())
    page = tc.read_result(tmp_path / "result.json")._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr>") == 2


def test_a_result_is_shown_as_table_html_and_image(measured):
    comparison = measured.compare(baseline=None, filter="onnx-*", sort="latency")
    assert "89.00% (-1.00)" in str(measured)
    assert [each["variant"] for each in comparison.rows] == ["onnx-int8"]
    assert "<td>89.00% (-1.00)</td>" in comparison._repr_html_()
    assert measured.plot("throughput", "memory")._repr_svg_().startswith("<?xml")


def test_the_text_of_a_comparison_is_the_same_in_a_notebook(measured, monkeypatch):
    text = str(measured.compare())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(measured.compare()) == text
    assert "onnx-int8@cpu" in text


@pytest.mark.parametrize("ending", [".html", ".csv", ".md", ".json"])
def test_a_comparison_is_saved(measured, tmp_path, ending):
    measured.compare().save(tmp_path / f"report{ending}")
    assert "onnx-int8@cpu" in (tmp_path / f"report{ending}").read_text()


@pytest.fixture
def interruptible():
    """Makes Ctrl-C raise `KeyboardInterrupt`; a shell starts programs in the background without this handler."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt(job):
    """Stands for a step during which the user interrupts, while a C library hides the interrupt."""
    (job.folder / "half").write_text("half of a model")
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("the callback failed") from error


def test_an_interrupted_call_leaves_no_half_artifact(model, interruptible, monkeypatch):
    monkeypatch.setitem(pipeline.STEPS, Quantize, (interrupt, pipeline.STEPS[Quantize][1]))
    before = {path.name for path in model.folder.iterdir() if not path.name.startswith(".")}
    with pytest.raises(KeyboardInterrupt):
        model.quantize(name="interrupted")
    assert {path.name for path in model.folder.iterdir() if not path.name.startswith(".")} == before
    assert not list(model.folder.rglob("half"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert model.quantize(name="interrupted").name == "onnx-int8+interrupted"


def test_an_error_without_an_interrupt_keeps_its_class():
    with pytest.raises(RuntimeError, match="a bug"), calling():
        raise RuntimeError("a bug")
    with pytest.raises(tc.ToolchainError, match="Free space"), calling():
        raise PermissionError(13, "Permission denied", "/exported")


def test_progress_has_a_bar_in_a_notebook_and_lines_elsewhere(monkeypatch, capsys):
    with progress.show_bar("build") as update:
        update(1, 2, "fitting")
    assert capsys.readouterr().err == ""
    kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    with progress.show_bar("build") as update:
        update(1, 2, "fitting")
        update(1, 3, "validating")
    progress.print_event("interrupted; the same command with --resume continues")
    err = capsys.readouterr().err
    assert "build: fitting" in err
    assert "build: validating" in err
    assert "interrupted; the same call with `resume` continues\n" in err


def test_an_interrupt_closes_the_bar(monkeypatch, capsys):
    from tqdm.auto import tqdm

    monkeypatch.setattr(progress, "_in_notebook", lambda: True)

    def run():
        with progress.show_bar("build") as update:
            update(1, 2, "fitting")
            assert len(tqdm._instances) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not tqdm._instances
    assert "build: fitting" in capsys.readouterr().err
