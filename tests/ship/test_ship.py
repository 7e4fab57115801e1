"""Tests of bundles: their content, the variants that `ship` refuses, and the detection of every changed byte."""

import ast
import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import ROOT, TESTS, make_checkpoint
from markdown_it import MarkdownIt

from toolchain.artifacts import store
from toolchain.artifacts.steps import Export
from toolchain.artifacts.store import sha256
from toolchain.backends.ort import extreme_product
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import pad
from toolchain.data.labels import REGRESSION, SINGLE, TOKENS
from toolchain.errors import ArtifactError, ProviderError, ShippingError, UnknownVariantError, VerdictError
from toolchain.progress import no_bar
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile
from toolchain.ship import bundles, checking, golden, shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.bundles import TOLERANCES
from toolchain.ship.shipping import Order
from toolchain.ship.targets import DTYPES, clients, served_name

MODEL = "model.onnx"  # path of the first model in a Python bundle


def quiet(line):
    pass


def make(workspace, output, *names, target="python", say=quiet, **order):
    return shipping.ship(workspace, Order(names, target, demo=False, **order), output, say, no_bar)


@pytest.fixture(scope="module")
def bundles_by_target(built_tiny, tmp_path_factory):
    """One bundle for each target. Tests must not change these bundles."""
    folder = tmp_path_factory.mktemp("bundles")
    make(built_tiny, folder / "web", "onnx-int8", "onnx-fp32", target="web")
    make(built_tiny, folder / "python", "onnx-int8")
    make(built_tiny, folder / "other", "onnx-std", target="other")
    make(built_tiny, folder / "mobile", "onnx-int8", "onnx-fp32", target="mobile")
    for target in ("mlflow", "ray-serve"):
        make(built_tiny, folder / target, "onnx-int8", target=target)
    return folder


@pytest.fixture
def bundle(bundles_by_target, tmp_path):
    """A copy of the Python bundle, which a test may change."""
    shutil.copytree(bundles_by_target / "python", tmp_path / "bundle")
    return tmp_path / "bundle"


def reseal(folder, change):
    """Changes bundle.json and computes its id again, as an attacker would."""
    body = json.loads((folder / "bundle.json").read_text())
    change(body)
    body["id"] = bundled.canonical_id(body)
    (folder / "bundle.json").write_text(json.dumps(body))


@pytest.mark.parametrize("target", ["web", "python", "other", "mlflow", "ray-serve"])
def test_a_bundle_passes_verification_and_describes_its_models(bundles_by_target, target, built_tiny):
    report = shipping.verify(bundles_by_target / target)
    body = json.loads((bundles_by_target / target / "bundle.json").read_text())
    assert report["id"] == body["id"]
    assert report["target"] == target
    on_disk = {
        p.relative_to(bundles_by_target / target).as_posix()
        for p in (bundles_by_target / target).rglob("*")
        if p.is_file()
    }
    assert {entry["path"] for entry in body["files"]} | {"bundle.json"} == on_disk
    assert on_disk >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "golden.json",
        "README.md",
        "verify.py",
        "mlbom.json",
    }
    assert body["labels"] == ["NEGATIVE", "POSITIVE"]
    for model in body["models"]:
        manifest = built_tiny.load(model["variant"]).manifest
        assert model["artifact_id"] == manifest.id
        assert sha256(bundles_by_target / target / model["file"]) == sha256(
            built_tiny.path(model["variant"]) / "model.onnx"
        )
        assert model["ir_version"] == manifest.facts["ir_version"]
        assert model["opset"] == manifest.facts["opset"]
        assert [spec["name"] for spec in model["inputs"]] == ["input_ids", "attention_mask"]
        assert model["measured"] == "not measured"
        assert model["tolerance"] == TOLERANCES["int8" if "int8" in model["variant"] else "fp32"]
        # The logits are almost equal to the recorded logits, because the same machine computed both.
        assert 0 <= report["models"][model["variant"]]["largest_delta"] < 1e-4


@pytest.fixture(scope="module")
def text_bundle(built_tiny, tmp_path_factory):
    """A Python bundle with the tokenizer in the graph. Tests must not change this bundle."""
    make(built_tiny, folder := tmp_path_factory.mktemp("texts") / "b", "onnx-int8", "onnx-fp32", with_tokenizer=True)
    return folder


@pytest.mark.slow
def test_a_bundle_with_its_tokenizer_in_the_graph_takes_texts(text_bundle, built_tiny, tmp_path, say):
    report = shipping.verify(text_bundle)
    body = json.loads((text_bundle / "bundle.json").read_text())
    assert body["tokenizer_in_graph"]["texts_compared"] > 3000
    for model in body["models"]:
        assert [(spec["name"], spec["dtype"]) for spec in model["inputs"]] == [("text", "string")]
        assert [spec["name"] for spec in model["outputs"]] == ["logits", "probabilities"]
        assert model["opset"]["ai.onnx.contrib"] == 1
        assert report["models"][model["variant"]]["largest_delta"] < 1e-4
    readme = (text_bundle / "README.md").read_text()
    assert "take `text`, any number of strings" in readme
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    block = block.replace("/path/to/this/folder", str(text_bundle))
    subprocess.run([sys.executable, "-B", "-c", block], cwd=text_bundle, check=True, capture_output=True)
    for command in (["verify.py"], ["classify.py", "café naïve"]):
        completed = subprocess.run(
            [sys.executable, *command], cwd=text_bundle, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, completed.stderr
    (tmp_path / "in.txt").write_text("a film\ncafé naïve\n\nutter waste\n")
    model_options = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported)
    bundle_run, variant_run = (
        say("predict", model, tmp_path / "in.txt", *model_options) for model in (text_bundle, "onnx-int8")
    )
    assert bundle_run[0] == variant_run[0] == 0, bundle_run[2] + variant_run[2]
    assert len(bundle_run[1].splitlines()) == 4
    assert bundle_run[1] == variant_run[1]


@pytest.mark.slow
def test_a_model_that_takes_texts_refuses_pairs(text_bundle, tmp_path, say):
    (tmp_path / "pairs.csv").write_text("a,b\none,two\n")
    command = ("predict", text_bundle, tmp_path / "pairs.csv", "--text-column", "a", "--text-pair-column", "b")
    code, out, err = say(*command)
    assert (code, out) == (1, "")
    assert "takes single texts, not pairs" in err


@pytest.mark.parametrize(
    ("target", "reason"),
    [("web", "onnxruntime-web"), ("other", "only ONNX Runtime can use the operators of onnxruntime-extensions")],
)
def test_with_tokenizer_is_refused_for_a_target_without_its_operators(built_tiny, tmp_path, target, reason):
    with pytest.raises(ShippingError, match="Ship without --with-tokenizer") as refusal:
        make(built_tiny, tmp_path / "b", "onnx-std", target=target, with_tokenizer=True)
    assert reason in str(refusal.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_without_onnxruntime_extensions_an_error_names_the_extra(text_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(ProviderError, match="pip install 'onnxruntime-extensions"):
        checking.check_own_bundle(text_bundle)


def test_a_web_bundle_has_the_layout_of_transformers_js(bundles_by_target):
    body = json.loads((bundles_by_target / "web" / "bundle.json").read_text())
    files = {model["variant"]: (model["dtype"], model["file"]) for model in body["models"]}
    assert files == {"onnx-int8": ("q8", "onnx/model_quantized.onnx"), "onnx-fp32": ("fp32", "onnx/model.onnx")}
    assert sorted(p.name for p in (bundles_by_target / "web" / "onnx").iterdir()) == [
        "model.onnx",
        "model_quantized.onnx",
    ]
    config = json.loads((bundles_by_target / "web" / "config.json").read_text())
    # The web bundle's default dtype is the dtype of the first variant that `ship` gets.
    assert config["transformers.js_config"] == {"dtype": "q8"}
    assert config["id2label"] == {"0": "NEGATIVE", "1": "POSITIVE"}
    assert not (bundles_by_target / "web" / "index.html").exists()


def test_a_bundle_states_where_its_models_are_exact(bundles_by_target, tiny, tmp_path):
    body = make(tiny, tmp_path / "b", "onnx-int8", "onnx-int8-portable", "onnx-fp32")
    int8, portable, fp32 = body["models"]
    assert int8["int8_headroom"] < 1 <= portable["int8_headroom"]
    assert "VNNI" in int8["exact_on"]
    assert portable["exact_on"] == fp32["exact_on"] == "any processor"
    assert fp32["int8_headroom"] is None
    assert portable["step"]["settings"]["reduce_range"] is True
    readme = (tmp_path / "b" / "README.md").read_text()
    assert "onnx-int8-portable: any processor." in readme
    assert "older x86-64" in readme


def test_headroom_is_computed_from_the_file_and_not_read_from_the_manifest(tiny, tmp_path):
    file = tiny.path("onnx-int8") / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["facts"]["int8_headroom"], manifest["seal"]  # as in a manifest of an older release
    file.write_text(json.dumps(manifest))
    assert make(tiny, tmp_path / "b", "onnx-int8")["models"][0]["int8_headroom"] < 1


def test_a_bundle_contains_no_path_of_this_machine(bundles_by_target, tiny_checkpoint, built_tiny):
    for path in bundles_by_target.rglob("*"):
        if path.is_file():
            for folder in (str(tiny_checkpoint.parent), str(built_tiny.exported), str(ROOT)):
                assert folder.encode() not in path.read_bytes(), path
    body = json.loads((bundles_by_target / "python" / "bundle.json").read_text())
    assert body["model"]["source"]["ref"] == tiny_checkpoint.name
    assert body["model"]["license"] == "not stated"


def test_a_bundle_has_the_measured_figures_and_their_hardware(tiny, tmp_path):
    committed_file = ResultFile.read(ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json")
    row = next(row for row in committed_file.rows if row.variant == "onnx-int8")
    own_row = dataclasses.replace(row, artifact_id=tiny.load("onnx-int8").manifest.id)
    results = ResultsFolder(tmp_path / "results")
    results.local.mkdir(parents=True)
    older_file = dataclasses.replace(
        committed_file, rows=(dataclasses.replace(own_row, throughput_per_s=None),), created="2020"
    )
    dataclasses.replace(committed_file, rows=(own_row,)).write(results.local / "a.json")
    assert older_file.created < committed_file.created
    body = make(tiny, tmp_path / "b", "onnx-int8", "onnx-fp32", license="MIT", results=results)
    figures, missing = (model["measured"] for model in body["models"])
    assert missing == "not measured"
    assert figures["accuracy"] == {"value": row.score.value, "count": 872}
    assert figures["latency_ms"] == {"p50": row.latency_ms["p50"], "p95": row.latency_ms["p95"]}
    assert (figures["cpu"], figures["provider"], figures["data"]) == (committed_file.machine["cpu"], "cpu", "sst2")
    assert body["model"]["license"] == "MIT"
    readme = (tmp_path / "b" / "README.md").read_text()
    assert committed_file.machine["cpu"] in readme
    assert "| onnx-fp32 | `onnx-fp32.onnx` |" in readme


def test_a_bundle_of_the_reference_states_licence_and_origin(reference, tmp_path):
    body = make(reference, tmp_path / "b", "onnx-int8")
    assert body["model"]["license"] == "Apache-2.0"
    assert "all-MiniLM-L6-v2" in body["model"]["origin"]
    assert "SST-2" in body["model"]["data"]
    assert "Licence: Apache-2.0." in (tmp_path / "b" / "README.md").read_text()
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "b" / MODEL).metadata_props}
    assert metadata["toolchain.license"] == "Apache-2.0"


HOSTILE = (
    "a`|``b <b>c</b> [d](http://e) ![f](g)](h) *i* ~~j~~ &amp; \\ ```\n# k\n\n* l\r\u2028\x1b[31m\u202e"
    " */ \"m' ${n} {{ o }}"
)


def render_readme(body, golden, target, task, text):
    """Renders the README of a bundle whose labels, names, licence and figures hold the text."""
    source = {"kind": "hub", "ref": text, "revision": text}
    measured = {"accuracy": None, "latency_ms": {}, "data": text, "provider": "cpu", "cpu": text, "threads": 1}
    models = [{**model, "measured": measured} for model in body["models"]]
    provenance = {"name": text, "origin": text, "license": text, "data": text, "source": source}
    body = {**body, "labels": [text, f"{text}2"], "model": provenance, "models": models, "task": task}
    template = bundles.template_environment().get_template(f"README.{target}.md.j2")
    return template.render(bundle=body, golden=golden, demo=False, served_name=served_name)


def parse_markdown(page):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)


def structure_of(page):
    """Returns the kinds of all blocks and inline elements of a Markdown page."""
    return [
        (token.type, token.tag, token.info, [child.type for child in token.children or []])
        for token in parse_markdown(page)
    ]


@pytest.mark.parametrize("task", [SINGLE, REGRESSION, TOKENS])
@pytest.mark.parametrize("target", ["web", "python", "other", "mobile", "mlflow", "ray-serve"])
def test_hostile_text_of_a_model_stays_text_in_the_readme(bundles_by_target, target, task):
    folder = bundles_by_target / target
    body, golden = (json.loads((folder / f"{name}.json").read_text()) for name in ("bundle", "golden"))
    page = render_readme(body, golden, target, task, HOSTILE)
    assert structure_of(page) == structure_of(render_readme(body, golden, target, task, "good"))
    assert not set("\x1b\u202e\u2028\r") & set(page)
    for block in parse_markdown(page):
        if block.type == "fence" and block.info == "python":
            strings = [node.value for node in ast.walk(ast.parse(block.content)) if isinstance(node, ast.Constant)]
            assert (HOSTILE in strings) == (target == "other" and task != REGRESSION)
        elif block.type == "fence":
            assert "http://e" not in block.content


def test_each_label_of_a_server_has_one_line():
    text = bundles.template_environment().get_template("labels.txt.j2").render(bundle={"labels": ["a\nb", "c\r", "d"]})
    assert text == "a\\nb\nc\\r\nd\n"


def test_a_tensor_name_cannot_end_a_string_of_a_server_configuration():
    pbtxt = bundles.template_environment().get_template("pbtxt.j2").module
    spec = {"name": 'a" dims: [ 9 ]\n', "dtype": "int64", "shape": [1, 2]}
    assert 'name: "a\\" dims: [ 9 ]\\n"\n' in pbtxt.tensor(spec)


def test_shipping_the_same_changes_nothing_and_another_variant_replaces_the_bundle(tiny, tmp_path):
    events = []
    first_body = make(tiny, tmp_path / "b", "onnx-int8")
    inode = (tmp_path / "b").stat().st_ino
    assert (
        make(tiny, tmp_path / "b", "onnx-int8", say=lambda event: events.append(str(event)))["id"] == first_body["id"]
    )
    assert f"{tmp_path / 'b'}: an equal bundle exists and stays unchanged" in events
    assert (tmp_path / "b").stat().st_ino == inode
    assert make(tiny, tmp_path / "b", "onnx-fp32")["id"] != first_body["id"]
    assert shipping.verify(tmp_path / "b")["models"].keys() == {"onnx-fp32"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "exported"]  # `ship` leaves no temporary file


def create_at(path, kind):
    if kind == "a folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif kind == "an empty folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("mine")
    elif kind == "a dangling link":
        path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("kind", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_shipping_does_not_overwrite_existing_files(tiny, tmp_path, kind):
    create_at(tmp_path / "b", kind)
    with pytest.raises(ArtifactError, match=str(tmp_path / "b")):
        make(tiny, tmp_path / "b", "onnx-int8")
    assert kind != "a folder" or (tmp_path / "b" / "mine.txt").read_text() == "mine"
    assert kind != "a file" or (tmp_path / "b").read_text() == "mine"


def test_a_changed_bundle_is_not_overwritten(tiny, bundle):
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt is not listed"):
        make(tiny, bundle, "onnx-int8")
    assert (bundle / "notes.txt").read_text() == "mine"


def test_an_interrupted_ship_keeps_the_old_bundle(tiny, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    make(tiny, tmp_path / "b", "onnx-int8")
    monkeypatch.setattr(checking, "check_own_bundle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path / "b", "onnx-fp32")
    monkeypatch.undo()
    assert shipping.verify(tmp_path / "b")["models"].keys() == {"onnx-int8"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "exported"]


REFUSED = {
    ("torch-fp32",): "no .onnx file",
    ("onnx-int8", "onnx-int8"): "named twice",
    ("bnb-nf4",): "no .onnx file",
}


@pytest.mark.parametrize("names", REFUSED)
def test_a_pytorch_variant_or_a_repeated_one_is_not_shipped(built_tiny, tmp_path, names):
    with pytest.raises(ShippingError, match=REFUSED[names]):
        make(built_tiny, tmp_path / "b", *names)
    assert list(tmp_path.iterdir()) == []


def test_a_web_bundle_refuses_two_variants_of_one_dtype(built_tiny, tmp_path):
    message = "onnx-int8 and onnx-int8-portable would both have the path onnx/model_quantized.onnx"
    with pytest.raises(ShippingError, match=re.escape(message)):
        make(built_tiny, tmp_path / "b", "onnx-int8", "onnx-int8-portable", target="web")


def test_an_unknown_variant_gives_an_error(built_tiny, tmp_path):
    with pytest.raises(UnknownVariantError):
        make(built_tiny, tmp_path / "b", "onnx-int9")


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-fp32"])
def test_an_error_names_operators_that_a_target_lacks_and_an_alternative(built_tiny, tmp_path, name):
    with pytest.raises(ShippingError, match=r"(DynamicQuantizeMatMul|Gelu).*onnx-std") as error:
        make(built_tiny, tmp_path / "b", name, target="other")
    assert "operators that only ONNX Runtime has" in str(error.value)
    assert not (tmp_path / "b").exists()


def test_a_variant_that_failed_validation_is_not_shipped(tiny, tmp_path):
    manifest = tiny.load("onnx-int8").manifest
    failed_report = {**manifest.validation, "passed": False}
    (tiny.path("onnx-int8") / "manifest.json").write_text(
        dataclasses.replace(manifest, validation=failed_report).to_json()
    )
    with pytest.raises(VerdictError, match="onnx-int8 did not pass validation"):
        make(tiny, tmp_path / "b", "onnx-int8")


@pytest.mark.slow
def test_a_stale_variant_is_rebuilt_before_it_is_shipped(tiny, tmp_path):
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(17)}, quiet)
    events = []
    body = make(tiny, tmp_path / "b", "onnx-fp32", say=lambda event: events.append(str(event)))
    assert "onnx-fp32: building (onnx-std changed)" in events
    assert body["models"][0]["artifact_id"] == tiny.load("onnx-fp32").manifest.id
    assert body["models"][0]["opset"][""] == 17


def test_a_tampered_variant_is_not_shipped(tiny, tmp_path):
    with (tiny.path("onnx-int8") / "model.onnx").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(store.TamperedError):
        make(tiny, tmp_path / "b", "onnx-int8")


def files_of(target):
    return ["bundle.json", "config.json", "golden.json", "tokenizer.json", "tokenizer_config.json", "README.md", target]


@pytest.mark.parametrize("name", files_of(MODEL))
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_finds_one_changed_byte(bundle, name, place):
    content = bytearray((bundle / name).read_bytes())
    index = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
    content[index] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(VerdictError, match=re.escape(name)):
        shipping.verify(bundle)
    assert bundled.main(bundle) == 3


@pytest.mark.parametrize("name", files_of(MODEL))
def test_verify_finds_a_truncated_file(bundle, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(VerdictError, match=re.escape(name)):
        shipping.verify(bundle)


def test_verify_finds_a_missing_and_an_added_file(bundle):
    (bundle / "payload.py").write_text("")
    with pytest.raises(VerdictError, match=r"payload\.py is not listed"):
        shipping.verify(bundle)
    (bundle / "payload.py").unlink()
    (bundle / "config.json").unlink()
    with pytest.raises(VerdictError, match=r"config\.json is missing"):
        shipping.verify(bundle)


def test_a_bundle_of_an_older_release_passes_verification(bundle):
    """Older releases wrote neither a bill of materials nor a lock file."""
    for name in ("mlbom.json", "requirements.lock"):
        (bundle / name).unlink()
    names = {"mlbom.json", "requirements.lock"}
    reseal(bundle, lambda body: body.update(files=[e for e in body["files"] if e["path"] not in names]))
    assert shipping.verify(bundle)["files"] == 9


PATHS = ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:secret", ""]


@pytest.mark.parametrize("path", PATHS)
def test_verify_refuses_a_path_outside_the_bundle(bundle, path):
    secret = bundle.parent / "secret"
    secret.write_text("")
    entry = {"path": path, "bytes": 0, "sha256": sha256(secret)}
    reseal(bundle, lambda body: body["files"].append(entry))
    with pytest.raises(VerdictError, match="is outside the folder"):
        shipping.verify(bundle)


@pytest.mark.parametrize("link", ["model", "folder", "bundle.json"])
def test_verify_refuses_a_link(bundle, link):
    outside = bundle.parent / "outside"
    if link == "folder":
        outside.mkdir()
        (outside / "note").write_text("")
        (bundle / "sub").symlink_to(outside)
        entry = {"path": "sub/note", "bytes": 0, "sha256": sha256(outside / "note")}
        reseal(bundle, lambda body: body["files"].append(entry))
    else:
        name = MODEL if link == "model" else link
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)
    with pytest.raises(VerdictError, match="is a link"):
        shipping.verify(bundle)


@pytest.mark.parametrize("change", ["schema", "no models", "list", "unlisted model"])
def test_verify_refuses_an_invalid_bundle_json(bundle, change):
    if change == "list":
        (bundle / "bundle.json").write_text("[]")
    else:
        reseal(
            bundle,
            {
                "schema": lambda body: body.update(schema=bundled.SCHEMA - 1),
                "no models": lambda body: body.pop("models"),
                "unlisted model": lambda body: body["models"][0].update(file="../model.onnx"),
            }[change],
        )
    with pytest.raises(VerdictError, match=r"bundle\.json|is not listed"):
        shipping.verify(bundle)


def test_verify_refuses_weights_outside_the_file(bundle):
    model = onnx.load(bundle / MODEL)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    onnx.save_model(model, bundle / MODEL)
    size, digest = (bundle / MODEL).stat().st_size, sha256(bundle / MODEL)

    def resize(body):
        entry = next(entry for entry in body["files"] if entry["path"] == MODEL)
        entry.update(bytes=size, sha256=digest)

    reseal(bundle, resize)
    with pytest.raises(VerdictError, match="stores the tensor"):
        shipping.verify(bundle)


def replace_and_reseal(bundle, name, content):
    (bundle / name).write_text(content)
    entry = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    reseal(bundle, lambda body: next(e for e in body["files"] if e["path"] == name).update(entry))


@pytest.mark.parametrize(
    "change", ["logits", "half of them", "batch", "tokens", "not finite", "none", "no batch", "other variant"]
)
def test_verify_finds_recorded_values_that_differ(bundle, change):
    golden = json.loads((bundle / "golden.json").read_text())
    if change == "logits":
        golden["logits"]["onnx-int8"][3][0] += 2 * TOLERANCES["int8"]["largest"]
    elif change == "batch":
        golden["batch_logits"]["onnx-int8"][1][3][0] += 2 * TOLERANCES["int8"]["largest"]
    elif change == "no batch":
        golden |= {"batches": [], "batch_logits": {"onnx-int8": []}}
    elif change == "half of them":
        golden["logits"]["onnx-int8"] = [[x + 0.05 for x in row] for row in golden["logits"]["onnx-int8"]]
    elif change == "tokens":
        golden["sentences"][3]["input_ids"][1] += 1
    elif change == "not finite":
        golden["logits"]["onnx-int8"][3][0] = float("nan")
    elif change == "none":
        golden = {"sentences": [], "logits": {"onnx-int8": []}}
    else:
        golden["logits"] = {"onnx-fp32": golden["logits"]["onnx-int8"]}
    replace_and_reseal(bundle, "golden.json", json.dumps(golden))
    with pytest.raises(VerdictError, match=r"logits|tokenizer splits|golden\.json") as error:
        shipping.verify(bundle)
    assert ("median difference" in str(error.value)) == (change == "half of them")


@pytest.mark.parametrize("left", [False, True])
def test_verify_pads_as_the_toolchain_does(left):
    rows, names = [[1, 2, 3], [4], [5, 6]], ("input_ids", "attention_mask", "token_type_ids")
    padded = bundled.pad_rows(rows, "left" if left else "right", 9)
    for name, array in pad(rows, names, 9, left).items():
        assert np.array_equal(np.array(padded[name]), array)


def test_a_bundle_has_batches_padded_on_either_side(bundles_by_target):
    for target in ("web", "python", "other", "mobile"):
        golden = json.loads((bundles_by_target / target / "golden.json").read_text())
        assert [batch["padding"] for batch in golden["batches"]] == ["right", "left"]
        for batch in golden["batches"]:
            lengths = {len(golden["sentences"][index]["input_ids"]) for index in batch["sentences"]}
            assert len(lengths) > 1
        assert set(golden["batch_logits"]) == set(golden["logits"])


def test_verify_finds_a_fault_that_affects_only_padded_batches(bundle):
    """ONNX Runtime up to 1.20 has a fault in padded batches: it gives the key padding mask the length of the query."""
    model = onnx.load(bundle / MODEL)
    attention = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    attention.input[5] = ""  # Without its bias input, the attention node attends to padding.
    del attention.input[5:]
    onnx.save(model, bundle / MODEL)
    entry = {"bytes": (bundle / MODEL).stat().st_size, "sha256": sha256(bundle / MODEL)}
    reseal(bundle, lambda body: next(e for e in body["files"] if e["path"] == MODEL).update(entry))
    with pytest.raises(VerdictError, match="the largest difference from the recorded logits"):
        shipping.verify(bundle)


def test_verify_refuses_a_runtime_that_is_too_old(bundle):
    reseal(bundle, lambda body: body.update(onnxruntime="99.1"))
    with pytest.raises(VerdictError, match=r"this is ONNX Runtime .* needs 99\.1 or newer") as error:
        shipping.verify(bundle)
    assert "pip install 'onnxruntime>=99.1'" in str(error.value)
    assert bundled.main(bundle) == 3


def test_a_saturating_runtime_gives_an_error_with_an_alternative(bundle, built_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "saturates", lambda exact=False: True)
    with pytest.raises(VerdictError, match="this runtime saturates 8-bit products") as error:
        checking.check_own_bundle(bundle)
    assert "use a -portable model" in str(error.value)
    monkeypatch.setattr(golden, "saturates", lambda exact=False: True)
    with pytest.raises(ShippingError, match="recorded logits of onnx-int8 would be wrong"):
        make(built_tiny, tmp_path / "b", "onnx-int8")
    assert not (tmp_path / "b").exists()
    make(built_tiny, tmp_path / "fp32", "onnx-fp32")  # an fp32 model has no products that saturate


@pytest.mark.parametrize(
    ("variant", "message"),
    [("onnx-int8", "on a processor that saturates 8-bit products"), ("onnx-fp32", "model.onnx cannot be loaded: ")],
)
def test_verify_blames_saturation_only_for_a_model_whose_products_saturate(
    built_tiny, tmp_path, monkeypatch, capsys, variant, message
):
    folder = tmp_path / "b"
    make(built_tiny, folder, variant)
    (folder / MODEL).write_bytes(b"not a graph")
    entry = {"bytes": (folder / MODEL).stat().st_size, "sha256": sha256(folder / MODEL)}
    reseal(folder, lambda body: next(e for e in body["files"] if e["path"] == MODEL).update(entry))
    # The patch simulates a processor without VNNI: products saturate unless `exact` is true.
    monkeypatch.setattr(bundled, "saturates", lambda exact=False: not exact)
    assert bundled.main(folder) == 3
    assert message in capsys.readouterr().err


def test_every_client_tests_saturation_with_the_same_product():
    files = TESTS.parent / "toolchain" / "ship" / "bundle_files"
    for name in ("verify.py", "classify.py", "classify_text.py", "classify_tokens.py", "node.mjs"):
        lines = re.findall(r'^ {2,4}"([A-Za-z0-9+/=]{60,})"', (files / name).read_text(), re.MULTILINE)
        assert base64.b64decode("".join(lines)) == extreme_product(), name


@pytest.mark.parametrize("name", ["__pycache__/classify.cpython-311.pyc", ".DS_Store", "json.py", ".git/config"])
def test_verify_refuses_every_unlisted_file(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(VerdictError, match=f"{re.escape(name)} is not listed"):
        shipping.verify(bundle)


@pytest.mark.parametrize(
    "command", [["verify.py"], ["classify.py", "a film"], ["-m", "toolchain", "verify", "."]], ids=lambda c: c[0]
)
def test_no_file_of_a_bundle_is_imported_as_a_library(bundle, command):
    libraries = ("json", "base64", "numpy", "onnxruntime", "__future__")
    for library in libraries:
        (bundle / f"{library}.py").write_text(f"import pathlib; pathlib.Path('imported {library}').touch()\n")
    run = subprocess.run([sys.executable, *command], cwd=bundle, capture_output=True, text=True, check=False)
    assert not list(bundle.glob("imported *"))
    assert run.returncode == (0 if command[0] == "classify.py" else 3), run.stderr
    assert command[0] == "classify.py" or re.search(rf"({'|'.join(libraries)})\.py is not listed", run.stderr)


def test_a_folder_without_a_bundle_is_a_failure_and_no_verdict(tmp_path):
    for folder, fault in ((tmp_path, "is not a bundle"), (tmp_path / "nothing", r"There is no folder .*nothing\.")):
        with pytest.raises(ShippingError, match=fault):
            shipping.verify(folder)
    assert bundled.main(tmp_path) == 1


def test_ship_and_verify_exit_with_their_codes(tiny, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_options = ("--model", tiny.model, "--exported", tiny.exported)
    folder = tiny.exported / tiny.model / "bundle-python"
    code, out, err = say("ship", "onnx-int8", "--target", "python", *model_options)
    bundle_id = json.loads((folder / "bundle.json").read_text())["id"]
    assert (code, out.splitlines()) == (0, [str(folder), f"id {bundle_id}"]), err
    code, out, _ = say("verify", folder)
    assert code == 0
    assert "onnx-int8: largest |Δlogit|" in out
    assert json.loads(say("verify", folder, "--json")[1])["files"] == 11
    (folder / "config.json").write_text("{}")
    assert say("verify", folder)[0] == 3
    assert say("verify", tmp_path)[0] == 1
    assert say("ship", "--target", "python", *model_options)[0] == 2
    assert say("ship", "onnx-int8", *model_options)[0] == 2
    code, _, err = say("ship", "onnx-int8", "--target", "other", *model_options)
    assert code == 1
    assert "onnx-std-int8" in err
    # A bundle is not a variant, so `variants` must not list it.
    rows = json.loads(say("variants", "--json", *model_options)[1])
    assert "bundle-python" not in {row["variant"] for row in rows}


def test_without_npm_an_error_names_no_demo(built_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ShippingError, match="npm is not installed") as error:
        clients.install(tmp_path)
    assert "--no-demo" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_failed_npm_leaves_no_file(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nmkdir node_modules\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ShippingError, match="npm error network"):
        clients.install(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_lock_file_pins_every_package_and_names_no_registry():
    lock = json.loads((clients.PACKAGES / clients.LOCK).read_text())
    dependencies = json.loads((clients.PACKAGES / "package.json").read_text())["dependencies"]
    assert lock["packages"][""]["dependencies"] == dependencies
    assert dependencies.keys() == set(clients.DEPENDENCIES)
    for path, package in lock["packages"].items():
        assert path == "" or ("integrity" in package and "resolved" not in package), path
    assert {clients.version(name) for name in dependencies} == set(dependencies.values())


def test_the_demo_page_has_no_development_build():
    lock = json.loads((clients.PACKAGES / clients.LOCK).read_text())
    for path, package in lock["packages"].items():
        assert "-" not in package.get("version", ""), path
    assert clients.version(clients.RUNTIME) == clients.version("onnxruntime-common")


def test_the_policy_of_the_page_allows_its_one_inline_script():
    import base64
    import hashlib

    page = (ROOT / "toolchain" / "ship" / "bundle_files" / "index.html").read_text()
    scripts = re.findall(r"<script[^>]*>([^<]+)</script>", page)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page


def test_the_python_code_of_a_readme_runs(bundles_by_target, tmp_path):
    """Runs the code of a bundle's README in the tests' environment; `test_clients.py` runs it without the toolchain."""
    shutil.copytree(bundles_by_target / "python", tmp_path / "bundle")
    block = re.search(r"```python\n(.*?)```", (tmp_path / "bundle" / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "app").mkdir()
    shutil.copy(tmp_path / "bundle" / "classify.py", tmp_path / "app")
    block = block.replace("/path/to/this/folder", str(tmp_path / "bundle"))
    run = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path / "app", capture_output=True, text=True, check=True
    )
    assert run.stdout.count("NEGATIVE") == run.stdout.count("POSITIVE") == 2
    shipping.verify(tmp_path / "bundle")  # `verify` fails if the README's code added a file to the bundle.


def test_every_dtype_has_a_tolerance():
    assert set(DTYPES) <= set(TOLERANCES)


@pytest.mark.slow
def test_a_bundle_of_many_labels_classifies_texts(tmp_path):
    labels = [f"label {i}" for i in range(7)]
    make_checkpoint(tmp_path / "many", labels, leaning=30)
    workspace = Workspace.open(str(tmp_path / "many"), tmp_path / "exported")
    body = make(workspace, tmp_path / "b", "onnx-int8")
    assert body["labels"] == labels
    run = subprocess.run(
        [sys.executable, "classify.py", "a film"], cwd=tmp_path / "b", capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\t")[0] == "label 6"


def test_files_for_bundles_do_not_import_this_package():
    for path in (TESTS.parent / "toolchain" / "ship" / "bundle_files").glob("*.py"):
        assert "toolchain" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL), path
