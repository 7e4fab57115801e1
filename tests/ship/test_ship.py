"""Bundles: their content, refusals, and the detection of every changed byte."""

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

from toolchain.artifacts import store
from toolchain.artifacts.steps import Export
from toolchain.artifacts.store import sha256
from toolchain.backends.ort import extreme_product
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import pad
from toolchain.errors import ArtifactError, ProviderError, ShippingError, UnknownVariantError, VerdictError
from toolchain.progress import no_bar
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile
from toolchain.ship import bundles, shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.bundles import TOLERANCES
from toolchain.ship.shipping import Order
from toolchain.ship.targets import DTYPES, clients

MODEL = "model.onnx"  # the first model of a Python bundle


def quiet(line):
    pass


def make(workspace, output, *names, target="python", say=quiet, **order):
    return shipping.ship(workspace, Order(names, target, demo=False, **order), output, say, no_bar)


@pytest.fixture(scope="module")
def shipped(built_tiny, tmp_path_factory):
    """One bundle of each target; not to be changed."""
    folder = tmp_path_factory.mktemp("bundles")
    make(built_tiny, folder / "web", "onnx-int8", "onnx-fp32", target="web")
    make(built_tiny, folder / "python", "onnx-int8")
    make(built_tiny, folder / "other", "onnx-std", target="other")
    make(built_tiny, folder / "mobile", "onnx-int8", "onnx-fp32", target="mobile")
    return folder


@pytest.fixture
def bundle(shipped, tmp_path):
    """A copy of the Python bundle; a test may change it."""
    shutil.copytree(shipped / "python", tmp_path / "bundle")
    return tmp_path / "bundle"


def reseal(folder, change):
    """bundle.json after `change`, its id made to add up again, as an attacker would."""
    body = json.loads((folder / "bundle.json").read_text())
    change(body)
    body["id"] = bundled.canonical_id(body)
    (folder / "bundle.json").write_text(json.dumps(body))


@pytest.mark.parametrize("target", ["web", "python", "other"])
def test_a_bundle_verifies_and_says_what_it_is(shipped, target, built_tiny):
    report = shipping.verify(shipped / target)
    body = json.loads((shipped / target / "bundle.json").read_text())
    assert report["id"] == body["id"]
    assert report["target"] == target
    on_disk = {p.relative_to(shipped / target).as_posix() for p in (shipped / target).rglob("*") if p.is_file()}
    assert {entry["path"] for entry in body["files"]} | {"bundle.json"} == on_disk
    assert on_disk >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "golden.json",
        "README.md",
        "verify.py",
    }
    assert body["labels"] == ["NEGATIVE", "POSITIVE"]
    for model in body["models"]:
        manifest = built_tiny.load(model["variant"]).manifest
        assert model["artifact_id"] == manifest.id
        assert sha256(shipped / target / model["file"]) == sha256(built_tiny.path(model["variant"]) / "model.onnx")
        assert model["ir_version"] == manifest.facts["ir_version"]
        assert model["opset"] == manifest.facts["opset"]
        assert [spec["name"] for spec in model["inputs"]] == ["input_ids", "attention_mask"]
        assert model["measured"] == "not measured"
        assert model["tolerance"] == TOLERANCES["int8" if "int8" in model["variant"] else "fp32"]
        assert 0 <= report["models"][model["variant"]]["largest_delta"] < 1e-4  # the machine it was made on


@pytest.fixture(scope="module")
def texts(built_tiny, tmp_path_factory):
    """A Python bundle with the tokenizer in the graph; not to be changed."""
    make(built_tiny, folder := tmp_path_factory.mktemp("texts") / "b", "onnx-int8", "onnx-fp32", with_tokenizer=True)
    return folder


@pytest.mark.slow
def test_text_in_probabilities_out(texts, built_tiny, tmp_path, say):
    report = shipping.verify(texts)
    body = json.loads((texts / "bundle.json").read_text())
    assert body["tokenizer_in_graph"]["texts_compared"] > 3000
    for model in body["models"]:
        assert [(spec["name"], spec["dtype"]) for spec in model["inputs"]] == [("text", "string")]
        assert [spec["name"] for spec in model["outputs"]] == ["logits", "probabilities"]
        assert model["opset"]["ai.onnx.contrib"] == 1
        assert report["models"][model["variant"]]["largest_delta"] < 1e-4
    readme = (texts / "README.md").read_text()
    assert "take `text`, any number of strings" in readme
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    block = block.replace("/path/to/this/folder", str(texts))
    subprocess.run([sys.executable, "-B", "-c", block], cwd=texts, check=True, capture_output=True)
    for command in (["verify.py"], ["classify.py", "café naïve"]):
        done = subprocess.run([sys.executable, *command], cwd=texts, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (tmp_path / "in.txt").write_text("a film\ncafé naïve\n\nutter waste\n")
    where = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported)
    by_bundle, by_variant = (say("predict", model, tmp_path / "in.txt", *where) for model in (texts, "onnx-int8"))
    assert by_bundle[0] == by_variant[0] == 0, by_bundle[2] + by_variant[2]
    assert len(by_bundle[1].splitlines()) == 4
    assert by_bundle[1] == by_variant[1]


@pytest.mark.slow
def test_pairs_are_for_models_that_take_tokens(texts, tmp_path, say):
    (tmp_path / "pairs.csv").write_text("a,b\none,two\n")
    command = ("predict", texts, tmp_path / "pairs.csv", "--text-column", "a", "--text-pair-column", "b")
    code, out, err = say(*command)
    assert (code, out) == (1, "")
    assert "takes single texts, not pairs" in err


@pytest.mark.parametrize(("target", "why"), [("web", "onnxruntime-web"), ("other", "other runtimes do not have")])
def test_where_there_are_no_such_operators_the_tokenizer_stays_beside_the_graph(built_tiny, tmp_path, target, why):
    with pytest.raises(ShippingError, match="Ship without --with-tokenizer") as refusal:
        make(built_tiny, tmp_path / "b", "onnx-std", target=target, with_tokenizer=True)
    assert why in str(refusal.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_text_bundle_without_the_library_says_what_to_install(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(ProviderError, match=r"toolchain\[text\]"):
        shipping.verify(texts)


def test_a_web_bundle_has_the_layout_transformers_js_reads(shipped):
    body = json.loads((shipped / "web" / "bundle.json").read_text())
    found = {model["variant"]: (model["dtype"], model["file"]) for model in body["models"]}
    assert found == {"onnx-int8": ("q8", "onnx/model_quantized.onnx"), "onnx-fp32": ("fp32", "onnx/model.onnx")}
    assert sorted(p.name for p in (shipped / "web" / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]
    config = json.loads((shipped / "web" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q8"}  # the first that was named
    assert config["id2label"] == {"0": "NEGATIVE", "1": "POSITIVE"}
    assert not (shipped / "web" / "index.html").exists()


def test_a_file_says_where_it_is_exact(shipped, tiny, tmp_path):
    body = make(tiny, tmp_path / "b", "onnx-int8", "onnx-int8-portable", "onnx-fp32")
    full, portable, plain = body["models"]
    assert full["int8_headroom"] < 1 <= portable["int8_headroom"]
    assert "VNNI" in full["exact_on"]
    assert portable["exact_on"] == plain["exact_on"] == "any processor"
    assert plain["int8_headroom"] is None
    assert portable["step"]["settings"]["reduce_range"] is True
    readme = (tmp_path / "b" / "README.md").read_text()
    assert "onnx-int8-portable: any processor." in readme
    assert "older x86-64" in readme


def test_headroom_is_that_of_the_file_and_not_of_what_an_older_release_noted(tiny, tmp_path):
    file = tiny.path("onnx-int8") / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["facts"]["int8_headroom"]
    file.write_text(json.dumps(manifest))
    assert make(tiny, tmp_path / "b", "onnx-int8")["models"][0]["int8_headroom"] < 1


def test_no_place_of_this_machine_is_in_a_bundle(shipped, tiny_checkpoint, built_tiny):
    for path in shipped.rglob("*"):
        if path.is_file():
            for place in (str(tiny_checkpoint.parent), str(built_tiny.exported), str(ROOT)):
                assert place.encode() not in path.read_bytes(), path
    body = json.loads((shipped / "python" / "bundle.json").read_text())
    assert body["model"]["source"]["ref"] == tiny_checkpoint.name
    assert body["model"]["license"] == "not stated"


def test_the_bundle_states_measurements_and_their_hardware(tiny, tmp_path):
    committed = ResultFile.read(ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json")
    row = next(row for row in committed.rows if row.variant == "onnx-int8")
    mine = dataclasses.replace(row, artifact_id=tiny.load("onnx-int8").manifest.id)
    results = ResultsFolder(tmp_path / "results")
    results.local.mkdir(parents=True)
    older = dataclasses.replace(committed, rows=(dataclasses.replace(mine, throughput_per_s=None),), created="2020")
    dataclasses.replace(committed, rows=(mine,)).write(results.local / "a.json")
    assert older.created < committed.created
    body = make(tiny, tmp_path / "b", "onnx-int8", "onnx-fp32", license="MIT", results=results)
    found, nothing = (model["measured"] for model in body["models"])
    assert nothing == "not measured"
    assert found["accuracy"] == {"value": row.accuracy.value, "count": 872}
    assert found["latency_ms"] == {"p50": row.latency_ms["p50"], "p95": row.latency_ms["p95"]}
    assert (found["cpu"], found["provider"], found["data"]) == (committed.machine["cpu"], "cpu", "sst2")
    assert body["model"]["license"] == "MIT"
    readme = (tmp_path / "b" / "README.md").read_text()
    assert committed.machine["cpu"] in readme
    assert "| onnx-fp32 | `onnx-fp32.onnx` |" in readme


def test_the_reference_says_whose_it_is(reference, tmp_path):
    body = make(reference, tmp_path / "b", "onnx-int8")
    assert body["model"]["license"] == "Apache-2.0"
    assert "all-MiniLM-L6-v2" in body["model"]["origin"]
    assert "SST-2" in body["model"]["data"]
    assert "Licence: Apache-2.0." in (tmp_path / "b" / "README.md").read_text()
    stated = {entry.key: entry.value for entry in onnx.load(tmp_path / "b" / MODEL).metadata_props}
    assert stated["toolchain.license"] == "Apache-2.0"


def test_shipping_again_changes_nothing_and_a_change_replaces_it(tiny, tmp_path):
    said = []
    first = make(tiny, tmp_path / "b", "onnx-int8")
    before = (tmp_path / "b").stat().st_ino
    assert make(tiny, tmp_path / "b", "onnx-int8", say=lambda event: said.append(str(event)))["id"] == first["id"]
    assert f"{tmp_path / 'b'}: an equal bundle exists, unchanged" in said
    assert (tmp_path / "b").stat().st_ino == before
    assert make(tiny, tmp_path / "b", "onnx-fp32")["id"] != first["id"]
    assert shipping.verify(tmp_path / "b")["models"].keys() == {"onnx-fp32"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "exported"]  # nothing is left beside it


def lies_there(place, what):
    if what == "a folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    elif what == "an empty folder":
        place.mkdir()
    elif what == "a file":
        place.write_text("mine")
    elif what == "a dangling link":
        place.symlink_to(place.parent / "nowhere")


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_a_foreign_file_or_folder_is_not_overwritten(tiny, tmp_path, what):
    lies_there(tmp_path / "b", what)
    with pytest.raises(ArtifactError, match=str(tmp_path / "b")):
        make(tiny, tmp_path / "b", "onnx-int8")
    assert what != "a folder" or (tmp_path / "b" / "mine.txt").read_text() == "mine"
    assert what != "a file" or (tmp_path / "b").read_text() == "mine"


def test_a_bundle_somebody_changed_is_not_overwritten(tiny, bundle):
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt is not listed"):
        make(tiny, bundle, "onnx-int8")
    assert (bundle / "notes.txt").read_text() == "mine"


def test_a_killed_ship_leaves_no_half_bundle(tiny, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    make(tiny, tmp_path / "b", "onnx-int8")
    monkeypatch.setattr(shipping, "verify", killed)
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
def test_a_variant_without_an_onnx_file_is_not_shipped(built_tiny, tmp_path, names):
    with pytest.raises(ShippingError, match=REFUSED[names]):
        make(built_tiny, tmp_path / "b", *names)
    assert list(tmp_path.iterdir()) == []


def test_two_variants_of_one_dtype_are_two_web_bundles(built_tiny, tmp_path):
    with pytest.raises(ShippingError, match=re.escape("would both have the path onnx/model_quantized.onnx")):
        make(built_tiny, tmp_path / "b", "onnx-int8", "onnx-int8-portable", target="web")


def test_an_unknown_variant_is_told(built_tiny, tmp_path):
    with pytest.raises(UnknownVariantError):
        make(built_tiny, tmp_path / "b", "onnx-int9")


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-fp32"])
def test_operators_a_target_lacks_are_named_with_what_to_ship(built_tiny, tmp_path, name):
    with pytest.raises(ShippingError, match=r"(DynamicQuantizeMatMul|Gelu).*onnx-std") as caught:
        make(built_tiny, tmp_path / "b", name, target="other")
    assert "operators that only ONNX Runtime has" in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_a_variant_that_failed_validation_is_not_shipped(tiny, tmp_path):
    file = tiny.path("onnx-int8") / "manifest.json"
    body = json.loads(file.read_text())
    body["validation"]["passed"] = False  # outside of the seal
    file.write_text(json.dumps(body))
    with pytest.raises(VerdictError, match="onnx-int8 did not pass validation"):
        make(tiny, tmp_path / "b", "onnx-int8")


@pytest.mark.slow
def test_a_stale_variant_is_built_anew_before_it_is_shipped(tiny, tmp_path):
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(17)}, quiet)
    said = []
    body = make(tiny, tmp_path / "b", "onnx-fp32", say=lambda event: said.append(str(event)))
    assert "onnx-fp32: building (onnx-std changed)" in said
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
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_byte_is_seen(bundle, name, where):
    content = bytearray((bundle / name).read_bytes())
    at = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[where]
    content[at] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(VerdictError, match=re.escape(name)):
        shipping.verify(bundle)
    assert bundled.main(bundle) == 3


@pytest.mark.parametrize("name", files_of(MODEL))
def test_a_truncated_file_is_seen(bundle, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(VerdictError, match=re.escape(name)):
        shipping.verify(bundle)


def test_a_missing_and_an_added_file_are_seen(bundle):
    (bundle / "payload.py").write_text("")
    with pytest.raises(VerdictError, match=r"payload\.py is not listed"):
        shipping.verify(bundle)
    (bundle / "payload.py").unlink()
    (bundle / "config.json").unlink()
    with pytest.raises(VerdictError, match=r"config\.json is missing"):
        shipping.verify(bundle)


PATHS = ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:secret", ""]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leaves_the_bundle_is_not_followed(bundle, path):
    secret = bundle.parent / "secret"
    secret.write_text("")
    entry = {"path": path, "bytes": 0, "sha256": sha256(secret)}
    reseal(bundle, lambda body: body["files"].append(entry))
    with pytest.raises(VerdictError, match="is outside the folder"):
        shipping.verify(bundle)


@pytest.mark.parametrize("what", ["model", "folder", "bundle.json"])
def test_a_link_is_not_followed(bundle, what):
    outside = bundle.parent / "outside"
    if what == "folder":
        outside.mkdir()
        (outside / "note").write_text("")
        (bundle / "sub").symlink_to(outside)
        entry = {"path": "sub/note", "bytes": 0, "sha256": sha256(outside / "note")}
        reseal(bundle, lambda body: body["files"].append(entry))
    else:
        name = MODEL if what == "model" else what
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)
    with pytest.raises(VerdictError, match="is a link"):
        shipping.verify(bundle)


@pytest.mark.parametrize("change", ["schema", "no models", "list", "unlisted model"])
def test_a_bundle_json_that_lies_about_its_shape_is_refused(bundle, change):
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


def test_weights_outside_the_file_are_not_loaded(bundle):
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


def replaced(bundle, name, content):
    (bundle / name).write_text(content)
    entry = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    reseal(bundle, lambda body: next(e for e in body["files"] if e["path"] == name).update(entry))


@pytest.mark.parametrize(
    "change", ["logits", "half of them", "batch", "tokens", "not finite", "none", "no batch", "other variant"]
)
def test_answers_that_are_not_the_recorded_ones_are_seen(bundle, change):
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
    replaced(bundle, "golden.json", json.dumps(golden))
    with pytest.raises(VerdictError, match=r"logits|tokenizer splits|golden\.json") as caught:
        shipping.verify(bundle)
    assert ("median difference" in str(caught.value)) == (change == "half of them")


@pytest.mark.parametrize("left", [False, True])
def test_golden_batches_are_padded_as_the_toolchain_pads(left):
    rows, names = [[1, 2, 3], [4], [5, 6]], ("input_ids", "attention_mask", "token_type_ids")
    mine = bundled.pad_rows(rows, "left" if left else "right", 9)
    for name, array in pad(rows, names, 9, left).items():
        assert np.array_equal(np.array(mine[name]), array)


def test_a_bundle_holds_batches_padded_on_either_side(shipped):
    for target in ("web", "python", "other", "mobile"):
        golden = json.loads((shipped / target / "golden.json").read_text())
        assert [batch["padding"] for batch in golden["batches"]] == ["right", "left"]
        for batch in golden["batches"]:
            lengths = {len(golden["sentences"][index]["input_ids"]) for index in batch["sentences"]}
            assert len(lengths) > 1
        assert set(golden["batch_logits"]) == set(golden["logits"])


def test_a_fault_of_padded_batches_alone_is_seen(bundle):
    """As of releases up to 1.20, which read the key padding mask of one query by the query's length."""
    model = onnx.load(bundle / MODEL)
    heads = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    heads.input[5] = ""  # without its bias it attends to padding
    del heads.input[5:]
    onnx.save(model, bundle / MODEL)
    entry = {"bytes": (bundle / MODEL).stat().st_size, "sha256": sha256(bundle / MODEL)}
    reseal(bundle, lambda body: next(e for e in body["files"] if e["path"] == MODEL).update(entry))
    with pytest.raises(VerdictError, match="the largest difference from the recorded logits"):
        shipping.verify(bundle)


def test_an_older_runtime_than_the_bundle_names_is_told_so(bundle):
    reseal(bundle, lambda body: body.update(onnxruntime="99.1"))
    with pytest.raises(VerdictError, match=r"this is ONNX Runtime .* needs 99\.1 or newer") as caught:
        shipping.verify(bundle)
    assert "pip install 'onnxruntime>=99.1'" in str(caught.value)
    assert bundled.main(bundle) == 3


def test_a_runtime_that_saturates_is_told_so_and_what_to_do(bundle, built_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "saturates", lambda exact=False: True)
    with pytest.raises(VerdictError, match="this runtime saturates 8-bit products") as caught:
        shipping.verify(bundle)
    assert "use a -portable model" in str(caught.value)
    monkeypatch.setattr(bundles, "saturates", lambda exact=False: True)
    with pytest.raises(ShippingError, match="recorded logits of onnx-int8 would be wrong"):
        make(built_tiny, tmp_path / "b", "onnx-int8")
    assert not (tmp_path / "b").exists()
    make(built_tiny, tmp_path / "fp32", "onnx-fp32")  # nothing in it can saturate


@pytest.mark.parametrize(
    ("variant", "words"),
    [("onnx-int8", "on a processor that saturates"), ("onnx-fp32", "model.onnx cannot be loaded: ")],
)
def test_saturation_explains_a_model_that_cannot_be_loaded_only_where_its_products_saturate(
    built_tiny, tmp_path, monkeypatch, capsys, variant, words
):
    made = tmp_path / "b"
    make(built_tiny, made, variant)
    (made / MODEL).write_bytes(b"not a graph")
    entry = {"bytes": (made / MODEL).stat().st_size, "sha256": sha256(made / MODEL)}
    reseal(made, lambda body: next(e for e in body["files"] if e["path"] == MODEL).update(entry))
    monkeypatch.setattr(bundled, "saturates", lambda exact=False: not exact)  # the option mends it, as without VNNI
    assert bundled.main(made) == 3
    assert words in capsys.readouterr().err


def test_every_client_asks_the_same_product_whether_its_processor_saturates():
    files = TESTS.parent / "toolchain" / "ship" / "bundle_files"
    for name in ("verify.py", "classify.py", "classify_text.py", "node.mjs"):
        lines = re.findall(r'^ {2,4}"([A-Za-z0-9+/=]{60,})"', (files / name).read_text(), re.MULTILINE)
        assert base64.b64decode("".join(lines)) == extreme_product(), name


@pytest.mark.parametrize("name", ["__pycache__/classify.cpython-311.pyc", ".DS_Store", "json.py", ".git/config"])
def test_every_unlisted_file_is_refused(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(VerdictError, match=f"{re.escape(name)} is not listed"):
        shipping.verify(bundle)


@pytest.mark.parametrize(
    "command", [["verify.py"], ["classify.py", "a film"], ["-m", "toolchain", "verify", "."]], ids=lambda c: c[0]
)
def test_no_file_of_a_bundle_stands_in_for_a_library(bundle, command):
    libraries = ("json", "base64", "numpy", "onnxruntime", "__future__")
    for library in libraries:
        (bundle / f"{library}.py").write_text(f"import pathlib; pathlib.Path('imported {library}').touch()\n")
    run = subprocess.run([sys.executable, *command], cwd=bundle, capture_output=True, text=True, check=False)
    assert not list(bundle.glob("imported *"))
    assert run.returncode == (0 if command[0] == "classify.py" else 3), run.stderr
    assert command[0] == "classify.py" or re.search(rf"({'|'.join(libraries)})\.py is not listed", run.stderr)


def test_no_bundle_is_a_failure_and_not_a_verdict(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ShippingError, match="is not a bundle"):
            shipping.verify(place)
    assert bundled.main(tmp_path) == 1


def test_the_commands_and_their_exit_codes(tiny, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ("--model", tiny.model, "--exported", tiny.exported)
    place = tiny.exported / tiny.model / "bundle-python"
    code, out, err = say("ship", "onnx-int8", "--target", "python", *where)
    assert (code, out.strip()) == (0, str(place)), err
    code, out, _ = say("verify", place)
    assert code == 0
    assert "onnx-int8: largest |Δlogit|" in out
    assert json.loads(say("verify", place, "--json")[1])["files"] == 9
    (place / "config.json").write_text("{}")
    assert say("verify", place)[0] == 3
    assert say("verify", tmp_path)[0] == 1
    assert say("ship", "--target", "python", *where)[0] == 2
    assert say("ship", "onnx-int8", *where)[0] == 2
    code, _, err = say("ship", "onnx-int8", "--target", "other", *where)
    assert code == 1
    assert "onnx-std-int8" in err
    # A bundle is no variant: the command that lists variants does not list it.
    listed = json.loads(say("variants", "--json", *where)[1])
    assert "bundle-python" not in {row["variant"] for row in listed}


def test_the_page_needs_npm_and_says_so(built_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ShippingError, match="npm is not installed") as caught:
        clients.install(tmp_path)
    assert "--no-demo" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_npm_that_fails_leaves_nothing(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nmkdir node_modules\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ShippingError, match="npm error network"):
        clients.install(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_lock_file_pins_every_package_and_names_no_registry():
    lock = json.loads((clients.PACKAGES / clients.LOCK).read_text())
    named = json.loads((clients.PACKAGES / "package.json").read_text())["dependencies"]
    assert lock["packages"][""]["dependencies"] == named
    for path, package in lock["packages"].items():
        assert path == "" or ("integrity" in package and "resolved" not in package), path
    assert {clients.version(name) for name in named} == set(named.values())


def test_the_policy_of_the_page_admits_its_one_inline_script():
    import base64
    import hashlib

    page = (ROOT / "toolchain" / "ship" / "bundle_files" / "index.html").read_text()
    inline = re.findall(r"<script[^>]*>([^<]+)</script>", page)
    assert len(inline) == 1
    digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page


def test_the_python_code_of_a_readme_runs(shipped, tmp_path):
    """In this environment; in one with nothing else it is run with the other clients."""
    shutil.copytree(shipped / "python", tmp_path / "bundle")
    block = re.search(r"```python\n(.*?)```", (tmp_path / "bundle" / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "app").mkdir()
    shutil.copy(tmp_path / "bundle" / "classify.py", tmp_path / "app")
    block = block.replace("/path/to/this/folder", str(tmp_path / "bundle"))
    run = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path / "app", capture_output=True, text=True, check=True
    )
    assert run.stdout.count("NEGATIVE") == run.stdout.count("POSITIVE") == 2
    shipping.verify(tmp_path / "bundle")  # its use leaves nothing in the bundle


def test_every_dtype_is_of_a_scheme_with_a_tolerance():
    assert set(DTYPES) <= set(TOLERANCES)


@pytest.mark.slow
def test_a_checkpoint_of_many_labels_is_shipped_and_asked(tmp_path):
    labels = [f"label {i}" for i in range(7)]
    make_checkpoint(tmp_path / "many", labels, leaning=30)
    workspace = Workspace.open(str(tmp_path / "many"), tmp_path / "exported")
    body = make(workspace, tmp_path / "b", "onnx-int8")
    assert body["labels"] == labels
    run = subprocess.run(
        [sys.executable, "classify.py", "a film"], cwd=tmp_path / "b", capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\t")[0] == "label 6"


def test_files_that_go_into_bundles_need_nothing_of_this_package():
    for path in (TESTS.parent / "toolchain" / "ship" / "bundle_files").glob("*.py"):
        assert "toolchain" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL), path
