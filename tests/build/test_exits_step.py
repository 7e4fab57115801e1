"""Tests of the step that adds exits, and of the command `exits`."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_checkpoint, needs_node, verify_in_node
from exit_graphs import open_model
from short_bench import SHORT

from toolchain import passes
from toolchain.artifacts.steps import EXITS_WEIGHT, Exits
from toolchain.artifacts.variants import derive_variant, get
from toolchain.backends import Place, open_session
from toolchain.bench import floors
from toolchain.bench import run as bench_run
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import SettingsError, ShippingError, UnknownVariantError
from toolchain.exits import heads
from toolchain.passes.exits import CONFIDENCE, change_confidence
from toolchain.passes.graph import array_of
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files.verify import read_bundle
from toolchain.ship.golden import select_stable_sentences
from toolchain.ship.shipping import Order

ROWS = 400


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A CSV with labelled sentences, which the tests use as training data."""
    data = inputs.load_embedded()
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "label"), *zip(data.texts[:ROWS], data.labels[:ROWS], strict=True)])
    return path


@pytest.fixture
def run(say, tiny, tiny_checkpoint, rows, monkeypatch):
    """Runs `toolchain exits` on the tiny model; returns exit code, output and messages.

    The layers of the tiny model have fewer weights than an exit costs, so exits cost nothing here. Its predictions are
    never confident, so a low temperature makes its heads confident.
    """
    monkeypatch.setattr("toolchain.exits.heads.TEMPERATURES", (1 / 8,))
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 0)

    def run_command(*arguments, train=rows):
        model = ("--model", tiny_checkpoint, "--exported", tiny.exported)
        return say("exits", *arguments, "--train-data", train, *model)

    return run_command


def manifest_of(workspace, name):
    return json.loads((workspace.path(name) / "manifest.json").read_text())


def test_names_tell_the_exits():
    for name, parent in [
        ("onnx-exits", "onnx-fp32"),
        ("onnx-exits-int8", "onnx-int8"),
        ("onnx-std-exits-int8", "onnx-std-int8"),
        ("onnx-pruned73-r4-exits-int8", "onnx-pruned73-r4-int8"),
        ("onnx-exits-int8-portable", "onnx-int8-portable"),
        ("onnx-exits-int4", "onnx-int4"),
    ]:
        assert get(name).parent == parent
        assert isinstance(get(name).step, Exits)
        assert derive_variant(parent, Exits()).name == name
    for parent in ("torch-fp32", "onnx-fp16", "onnx-webgpu", "onnx-exits-int8"):
        with pytest.raises(UnknownVariantError):
            derive_variant(parent, Exits())


@pytest.mark.parametrize("layers", [(), (1, 0), (1, 1)])
def test_layers_must_ascend(layers):
    with pytest.raises(SettingsError, match="ascending"):
        Exits(layers)


def test_the_command_builds_a_variant_and_says_who_exits(run, tiny, rows):
    code, out, err = run("--from", "onnx-fp32", "--max-drop", "50", "--layers", "0,1")
    assert code == 0, err
    assert out.split()[-1] == str(tiny.path("onnx-exits"))
    assert "held-out rows, " in err
    manifest = manifest_of(tiny, "onnx-exits")
    facts = manifest["facts"]["exits"]
    assert facts["layers"] == [0, 1]
    assert facts["held_out_rows"] == ROWS // 10
    assert facts["drop"] <= 50
    assert facts["work"] < 1
    assert manifest["facts"]["operators"]["If"] == 2
    assert manifest["validation"]["agreement"] == "free"
    code, _, err = run("--from", "onnx-fp32", "--max-drop", "50", "--layers", "0,1")
    assert code == 0
    assert "onnx-exits: fresh, skipped" in err


def test_the_same_command_gives_the_same_bytes(run, tiny):
    contents = []
    for _ in range(2):
        assert run("--from", "onnx-fp32", "--max-drop", "50", "--name", "again")[0] == 0
        contents.append((tiny.path("onnx-exits+again") / "model.onnx").read_bytes())
        (tiny.path("onnx-exits+again") / "manifest.json").unlink()
        for file in tiny.path("onnx-exits+again").iterdir():
            file.unlink()
        tiny.path("onnx-exits+again").rmdir()
    assert contents[0] == contents[1]


def test_texts_of_a_batch_get_the_labels_that_they_get_alone(run, tiny):
    assert run("--from", "onnx-fp32", "--max-drop", "50")[0] == 0
    path = tiny.path("onnx-exits")
    encoder = Encoder.open(path, ("input_ids", "attention_mask"), 512)
    session = open_session(path, "onnx", Place("cpu", 1))
    texts = encoder.encode(inputs.load_embedded().texts[:64])
    alone = np.concatenate([session.run(pad([row], encoder.names, encoder.pad_id)) for row in texts])
    together = session.run(pad(texts, encoder.names, encoder.pad_id))
    assert np.abs(alone - together).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--from", "torch-fp32"), 1, "an ONNX graph for CPUs"),
        (("--from", "onnx-webgpu"), 1, "an ONNX graph for CPUs"),
        (("--layers", "x"), 2, "not a list of numbers"),
        (("--layers", "3,1"), 2, "ascending"),
        (("--from", "onnx-fp32", "--layers", "2"), 1, "has no exit after 2 layers. Use layers from 0 to 1."),
        (("--from", "onnx-fp32", "--layers", "-1"), 1, "has no exit after -1 layers"),
        (("--max-drop", "-1"), 2, "--max-drop"),
    ],
)
def test_wrong_input_gets_one_sentence(run, arguments, code, message):
    found_code, _, err = run(*arguments)
    assert (found_code, message in " ".join(err.split())) == (code, True), err


def test_a_model_that_does_not_classify_texts_is_refused(tmp_path, say):
    checkpoint = make_checkpoint(tmp_path / "stars", ("stars",))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    code, _, err = say("exits", "--from", "onnx-fp32", "--model", checkpoint, "--exported", tmp_path / "exported")
    assert code == 1
    assert "does not classify texts" in err


def test_heads_also_learn_from_pairs_of_rows(run, monkeypatch):
    calls = []

    def compute_logits(artifact, rows, *arguments):
        calls.append([len(row) for row in rows])
        return original(artifact, rows, *arguments)

    original = heads.compute_logits
    monkeypatch.setattr(heads, "compute_logits", compute_logits)
    assert run("--from", "onnx-fp32", "--max-drop", "50", "--name", "pairs")[0] == 0
    training, held_out = calls
    assert len(held_out) == ROWS // 10
    rows, pairs = training[: len(training) // 2], training[len(training) // 2 :]
    assert len(rows) == len(pairs)
    assert 1.8 * sum(rows) < sum(pairs) < 2.2 * sum(rows)


def test_recovery_trains_early_layers_on_request(run, say, tiny, tiny_checkpoint, rows):
    arguments = ("--model", tiny_checkpoint, "--exported", tiny.exported, "--train-data", rows)
    code, _, err = say("prune", "--ratio", "0.5", "--recover", "1", "--exits", *arguments)
    assert code == 0, err
    manifest = manifest_of(tiny, "torch-pruned50-r1")
    assert manifest["step"]["settings"]["exits"] == EXITS_WEIGHT == manifest["facts"]["recovery"]["exits"]
    assert run("--from", "onnx-pruned50-r1", "--max-drop", "50")[0] == 0
    assert manifest_of(tiny, "onnx-pruned50-r1-exits")["facts"]["exits"]["drop"] <= 50


def test_recovery_trains_no_exits_where_predictions_have_no_confidence(tmp_path, say, rows):
    checkpoint = make_checkpoint(tmp_path / "stars", ("stars",))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    arguments = ("--model", checkpoint, "--exported", tmp_path / "exported", "--train-data", rows)
    code, _, err = say("prune", "--ratio", "0.5", "--method", "magnitude", "--recover", "1", "--exits", *arguments)
    assert code == 1
    assert "does not classify texts" in err
    assert not (tmp_path / "exported" / "stars" / "torch-pruned50-r1").exists()


def test_a_drop_that_no_exits_keep_is_a_verdict(run, tiny, monkeypatch):
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 10**9)  # as if exits cost more than all layers
    code, _, err = run("--from", "onnx-fp32")
    assert code == 3
    assert "No exits save work" in err
    assert not tiny.path("onnx-exits").exists()


def test_a_golden_sentence_is_not_near_the_confidence_of_an_exit(run, tiny, tmp_path):
    """Another machine rounds otherwise, and could let such a sentence leave at another exit."""
    assert run("--from", "onnx-fp32", "--max-drop", "50", "--layers", "0")[0] == 0
    artifact = tiny.load("onnx-exits")
    sentences = list(inputs.load_embedded().texts[:12])
    model = passes.read(artifact.onnx_path)
    encoder = Encoder.open(artifact.path, ("input_ids", "attention_mask"), 512)
    batch = pad(encoder.encode(sentences[:1]), encoder.names, encoder.pad_id)

    def set_confidence(value):
        change_confidence(model, lambda _: value)
        return open_model(model).run(None, batch)[0].tolist()

    low, high = 0.5, 1.0
    at_the_exit = set_confidence(low)
    assert set_confidence(high) != at_the_exit
    for _ in range(20):  # the confidence of the first sentence
        middle = (low + high) / 2
        low, high = (middle, high) if set_confidence(middle) == at_the_exit else (low, middle)
    passes.write(model, artifact.onnx_path)
    steady = select_stable_sentences([artifact], sentences)
    assert sentences[0] not in steady
    assert steady
    change_confidence(model, lambda confidence: confidence + 0.1 * confidence * (1 - confidence))
    other = open_model(model)
    for text in steady:
        row = pad(encoder.encode([text]), encoder.names, encoder.pad_id)
        assert (
            other.run(None, row)[0].tolist() == open_model(passes.read(artifact.onnx_path)).run(None, row)[0].tolist()
        )
    assert select_stable_sentences([tiny.load("onnx-fp32")], sentences) == sentences
    with pytest.raises(ShippingError, match="every golden sentence is near the threshold"):
        select_stable_sentences([artifact], sentences[:1])


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_a_benchmark_finds_the_exit_of_each_sentence(run, tiny, tmp_path, monkeypatch):
    assert run("--from", "onnx-fp32", "--max-drop", "50", "--layers", "0,1")[0] == 0
    monkeypatch.chdir(tmp_path)
    content = (tiny.path("onnx-exits") / "model.onnx").read_bytes()
    request = bench_run.Request(("onnx-fp32", "onnx-exits"), ("cpu",), SHORT)
    result, journal = bench_run.measure(tiny, request, lambda line: None, lambda *_: None)
    rows = {row.variant: row for row in result.rows}
    assert all(row.status == "ok" for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["onnx-fp32"].exits == ()
    assert sum(rows["onnx-exits"].exit_shares) == pytest.approx(1, abs=1e-3)
    # A sentence uses the first exit if a threshold of 0, which sends every sentence there, leaves its logits unchanged.
    artifact = tiny.load("onnx-exits")
    encoder = Encoder.open(artifact.path, ("input_ids", "attention_mask"), 512)
    model = passes.read(artifact.onnx_path)
    session = open_model(model)
    change_confidence(model, lambda _: 0.0)
    first = open_model(model)
    for text, passed in list(zip(inputs.load_embedded().texts, rows["onnx-exits"].exits, strict=True))[:100]:
        batch = pad(encoder.encode([text]), encoder.names, encoder.pad_id)
        assert np.array_equal(session.run(None, batch)[0], first.run(None, batch)[0]) == (passed == 0)
    works = {name: row.facts["roofline"] for name, row in rows.items()}
    assert works["onnx-exits"]["macs"] < works["onnx-fp32"]["macs"]
    assert 0 <= works["onnx-exits"]["share"] < 1
    assert (tiny.path("onnx-exits") / "model.onnx").read_bytes() == content
    # A result without the exits of its sentences has no floor for such a variant.
    unknown = replace(rows["onnx-exits"], exits=())
    assert floors.floor_fact(tiny, unknown, result.run["rates"], [9] * 872) == {}
    journal.end()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["python", "web", "mobile", "server", "ray-serve", "mlflow", "other"])
def test_a_variant_with_exits_is_shipped_to_every_target(run, tiny, tmp_path, target):
    parent = "onnx-std" if target == "other" else "onnx-int8"
    name = "onnx-std-exits" if target == "other" else "onnx-exits-int8"
    assert run("--from", parent, "--max-drop", "50")[0] == 0
    shipping.ship(tiny, Order((name,), target, demo=False, license="MIT"), tmp_path / "b", lambda line: None, no_bar)
    (model,) = [model for model in read_bundle(tmp_path / "b")["models"] if model["variant"] == name]
    assert model["operators"]["If"]
    facts = manifest_of(tiny, name)["facts"]["exits"]
    assert model["exits"] == {key: facts[key] for key in model["exits"]}
    assert (
        "texts can skip layers, so its time depends on the text. Of 40 held-out rows, "
        in (tmp_path / "b" / "README.md").read_text()
    )
    shipping.verify(tmp_path / "b")


@needs_node
@pytest.mark.slow
def test_node_gives_the_golden_logits(run, tiny, tmp_path):
    assert run("--from", "onnx-int8", "--max-drop", "50")[0] == 0
    shipping.ship(tiny, Order(("onnx-exits-int8",), "web", demo=False), tmp_path / "b", lambda line: None, no_bar)
    assert "onnx-exits-int8: golden sentences passed" in verify_in_node(tmp_path / "b")[-1]


def test_ship_takes_another_point_of_the_curve(run, say, tiny, tiny_checkpoint, tmp_path):
    assert run("--from", "onnx-fp32", "--max-drop", "50", "--layers", "0,1")[0] == 0
    facts = manifest_of(tiny, "onnx-exits")["facts"]["exits"]
    model = ("--model", tiny_checkpoint, "--exported", tiny.exported, "--license", "MIT")

    def ship(confidence):
        order = ("onnx-exits", "--target", "python", "--output", tmp_path / str(confidence))
        return say("ship", *order, *(("--exit-confidence", confidence) if confidence else ()), *model)

    assert ship(None)[0] == 0
    files = {}
    for point in (facts["curve"][0], facts["curve"][-1]):
        code, _, err = ship(point["confidence"])
        assert code == 0, err
        folder = tmp_path / str(point["confidence"])
        shipping.verify(folder)
        (entry,) = read_bundle(folder)["models"]
        assert entry["exits"] == {**{key: facts[key] for key in ("layers", "held_out_rows")}, **point}
        assert entry["measured"] == "not measured"
        files[point["confidence"]] = (folder / "model.onnx").read_bytes()
    assert len({*files.values(), (tmp_path / "None" / "model.onnx").read_bytes()}) >= 2
    first, last = (passes.read(tmp_path / str(confidence) / "model.onnx") for confidence in files)
    assert [float(array_of(each.graph.initializers[CONFIDENCE])) for each in (first, last)] == pytest.approx(
        list(files)
    )
    code, _, err = ship(0.123)
    assert code == 1
    assert "did not measure the exit confidence 0.123. Use one of 0.6, 0.7" in " ".join(err.split())
    assert not (tmp_path / "0.123").exists()


def test_only_a_variant_with_exits_takes_a_confidence(say, tiny, tiny_checkpoint, tmp_path):
    arguments = ("onnx-int8", "--target", "python", "--output", tmp_path / "b", "--exit-confidence", "0.9")
    code, _, err = say("ship", *arguments, "--model", tiny_checkpoint, "--exported", tiny.exported, "--license", "MIT")
    assert code == 1
    assert "onnx-int8 has no exits" in err
    assert not (tmp_path / "b").exists()


def test_too_few_rows_outside_the_held_out_texts_are_refused(run, tmp_path):
    file = tmp_path / "repeated.csv"
    file.write_text("sentence,label\n" + "a film,1\nno film,0\n" * 200)
    code, _, err = run("--from", "onnx-fp32", train=file)
    assert code == 1
    assert "has only 0 training rows whose text is not contained in a held-out row" in " ".join(err.split())
