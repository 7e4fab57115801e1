"""Tests of the metadata in an .onnx file, in an artifact and in every bundle."""

import json

import onnx
import onnxruntime as ort
import onnxruntime_extensions
import pytest
from conftest import make_checkpoint

from toolchain.artifacts.store import sha256
from toolchain.build.pipeline import ensure
from toolchain.build.steps import export, importing, optimize, quantize
from toolchain.build.workspace import Workspace
from toolchain.models.checkpoints import MODEL_CARD, REFERENCE
from toolchain.models.model_card import LIMIT, license_of
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

EXACT = '{"x86-64 without VNNI or AMX": {"session.x64quantprecision": "1"}}'


def quiet(line):
    pass


def read_properties(path):
    """Returns the metadata that ONNX Runtime reads from a file, without the prefix `toolchain.`."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    metadata = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).get_modelmeta()
    assert metadata.producer_name == "toolchain"
    assert all(key.startswith("toolchain.") for key in metadata.custom_metadata_map)
    return {key.removeprefix("toolchain."): value for key, value in metadata.custom_metadata_map.items()}


@pytest.mark.parametrize(
    ("variant", "producer", "options"),
    [
        ("onnx-std", f"export {export.VERSION}", "{}"),
        ("onnx-fp32", f"optimize {optimize.VERSION}", "{}"),
        ("onnx-int8", f"quantize {quantize.VERSION}", EXACT),
    ],
)
def test_an_onnx_file_has_the_metadata_of_its_variant(built_tiny, variant, producer, options):
    artifact = built_tiny.load(variant)
    assert read_properties(artifact.onnx_path) == {
        "labels": '["NEGATIVE", "POSITIVE"]',
        "multi_label": "false",
        "max_length": "512",
        "model": "tiny",
        "variant": variant,
        "parent_id": artifact.manifest.parent_id,
        "license": "not stated",
        "tokenizer_sha256": sha256(artifact.path / "tokenizer.json"),
        "session_options": options,
    }
    model = onnx.load(artifact.onnx_path)
    assert model.producer_version == producer
    assert model.doc_string == f"Variant {variant} of the text classifier tiny."


def test_a_file_that_never_saturates_states_no_session_option(built_tiny):
    artifact = ensure(built_tiny, ["onnx-int8-portable"], {}, quiet)["onnx-int8-portable"]
    assert read_properties(artifact.onnx_path)["session_options"] == "{}"


@pytest.mark.slow
def test_an_onnx_file_has_any_labels_and_the_licence_of_its_model_card(tmp_path):
    labels = ["fröhlich", 'say "no"', "c"]
    checkpoint = make_checkpoint(tmp_path / "three", labels, leaning=30)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    (checkpoint / MODEL_CARD).write_text("---\nlicense: mit\n---\n")
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    artifact = ensure(workspace, ["onnx-fp32"], {}, quiet)["onnx-fp32"]
    properties = read_properties(artifact.onnx_path)
    assert (json.loads(properties["labels"]), properties["multi_label"], properties["license"]) == (
        labels,
        "true",
        "mit",
    )
    body = shipping.ship(workspace, Order(("onnx-fp32",), "python"), tmp_path / "b", quiet, no_bar)
    assert body["model"]["license"] == "mit"
    assert sha256(tmp_path / "b" / "model.onnx") == sha256(artifact.onnx_path)


SHIPPED = [
    ("python", {}),
    ("python", {"with_tokenizer": True}),
    ("server", {}),
    ("mobile", {"ort_mobile": "1.17"}),
    ("mobile", {"with_tokenizer": True}),
    ("web", {"demo": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "settings"), SHIPPED)
def test_a_shipped_file_has_the_same_metadata_and_the_licence_of_its_bundle(built_tiny, tmp_path, target, settings):
    order = Order(("onnx-int8",), target, license="MIT", **settings)
    body = shipping.ship(built_tiny, order, tmp_path / "b", quiet, no_bar)
    assert body["model"]["license"] == "MIT"
    expected = {**read_properties(built_tiny.path("onnx-int8") / "model.onnx"), "license": "MIT"}
    model = body["models"][0]
    assert json.loads(expected["session_options"]) == model["session_options"]
    assert read_properties(tmp_path / "b" / model["file"]) == expected
    if target == "mobile":  # the ORT file has unsigned weights, so its products are exact without an option
        assert read_properties(tmp_path / "b" / model["ort"]["file"]) == {**expected, "session_options": "{}"}


CARDS = {
    "---\nlicense: mit\nlanguage: en\n---\n# Model": "mit",
    "---\nlanguage: en\nlicense: 'apache-2.0'  # as its base\n---": "apache-2.0",
    "---\r\nlicense: cc-by-4.0\r\n---\r\n": "cc-by-4.0",
    "\ufeff---\nlicense: mit\n---\n": "mit",
    "---\nlicense: other\nlicense_name: my licence 2.0\n---\n": "my licence 2.0",
    "---\nlicense: other\n---\n": "other",
    "---\nlicense:\n- mit\n- apache-2.0\n---\n": None,
    "---\nlicense: &a [*a, *a]\n---\n": None,
    "---\nlanguage: en\n---\nlicense: mit\n": None,
    "---\nlicense: mit\n": None,
    "license: mit\n": None,
    f"---\nlicense: {'x' * 200}\n---\n": None,
    f"---\n{'#' * LIMIT}\nlicense: mit\n---\n": None,
    "": None,
}


@pytest.mark.parametrize(("card", "licence"), CARDS.items(), ids=range(len(CARDS)))
def test_license_of_reads_the_licence_from_the_model_card(tmp_path, card, licence):
    (tmp_path / MODEL_CARD).write_text(card, encoding="utf-8", newline="")
    assert license_of(tmp_path) == licence


def test_license_of_is_none_without_a_model_card(tmp_path):
    assert license_of(tmp_path) is None
    (tmp_path / MODEL_CARD).mkdir()
    assert license_of(tmp_path) is None
    assert license_of(REFERENCE) == "Apache-2.0"


def test_an_adapter_has_a_licence_only_where_its_base_states_the_same_one(tmp_path):
    for name, licence in (("base", "mit"), ("same", "mit"), ("other", "gpl-3.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL_CARD).write_text(f"---\nlicense: {licence}\n---\n")
    (tmp_path / "none").mkdir()
    facts = {name: importing.license_facts(tmp_path / name, tmp_path / "base") for name in ("same", "other", "none")}
    assert facts == {"same": {"license": "mit"}, "other": {}, "none": {}}


def test_an_onnx_file_contains_no_path_of_this_machine(built_tiny, tiny_checkpoint):
    for variant in ("onnx-std", "onnx-int8"):
        content = (built_tiny.path(variant) / "model.onnx").read_bytes()
        for folder in (tiny_checkpoint.parent, built_tiny.exported):
            assert str(folder).encode() not in content
