"""Tests of Triton model repositories: the configurations are valid, and the models run with the declared shapes.

`make test-clients` installs Triton's client, which contains the protobuf definition of the configurations. Without
Triton's client, the tests that parse configurations are skipped.
"""

import json
import shutil
import subprocess

import numpy as np
import onnxruntime as ort
import onnxruntime_extensions
import pytest
import yaml
from conftest import ROOT, TESTS, make_checkpoint

from toolchain.backends.ort import session_options
from toolchain.build.workspace import Workspace
from toolchain.data import encoding
from toolchain.data.labels import MULTI, SINGLE, label_probabilities
from toolchain.errors import ArtifactError, VerdictError
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.shipping import Order
from toolchain.ship.targets import served_name

PYTHON = ROOT / "exported" / ".cache" / "test-clients" / "triton" / "bin" / "python"
TYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_STRING": object}
ORT_TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)", "TYPE_STRING": "tensor(string)"}
LIBRARY = "/mnt/models/libortextensions.so"

needs_triton = pytest.mark.skipif(not PYTHON.exists(), reason="needs `make test-clients`")


def make(workspace, output, *names, **order):
    return shipping.ship(workspace, Order(names, "server", **order), output, lambda line: None, no_bar)


@pytest.fixture(scope="module")
def bundle(built_tiny, tmp_path_factory):
    """A bundle of two models whose inputs are token ids. Tests must not change this bundle."""
    folder = tmp_path_factory.mktemp("server") / "bundle"
    make(built_tiny, folder, "onnx-int8", "onnx-fp32")
    return folder


@pytest.fixture(scope="module")
def text_bundle(built_tiny, tmp_path_factory):
    """A bundle of a model that takes texts."""
    folder = tmp_path_factory.mktemp("server") / "bundle"
    make(built_tiny, folder, "onnx-int8", with_tokenizer=True)
    return folder


def read_configs(bundle):
    command = [PYTHON, TESTS / "clients" / "triton.py", bundle / "repository"]
    return json.loads(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)


def run_model(bundle, config, batch):
    """Runs a model as Triton does, on a batch of the declared types and shapes; returns its outputs by name."""
    # Triton cannot set the session option for exact products, so servers without VNNI need portable int8 variants.
    options = session_options(1)
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        assert library == LIBRARY
        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    name = config.get("default_model_filename", "model.onnx")
    file = bundle / "repository" / config["name"] / "1" / name
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {}
    inputs_by_name = {value.name: value for value in session.get_inputs()}
    assert set(inputs_by_name) == {spec["name"] for spec in config["input"]}
    for spec in config["input"]:
        tensor = batch[spec["name"]]
        assert tensor.dtype == TYPES[spec["data_type"]]
        assert inputs_by_name[spec["name"]].type == ORT_TYPES[spec["data_type"]]
        require_dims(tensor, spec)
        feed[spec["name"]] = tensor.reshape(len(tensor)) if "reshape" in spec else tensor
        assert feed[spec["name"]].ndim == len(inputs_by_name[spec["name"]].shape)
    names = [spec["name"] for spec in config["output"]]
    tensors_by_name = dict(zip(names, session.run(names, feed), strict=True))
    for spec in config["output"]:
        assert tensors_by_name[spec["name"]].dtype == TYPES[spec["data_type"]]
        require_dims(tensors_by_name[spec["name"]], spec)
    return tensors_by_name


def require_dims(tensor, spec):
    """Checks that the tensor has a batch axis and then the dimensions that `spec` declares."""
    dims = [int(dim) for dim in spec["dims"]]
    assert tensor.ndim == 1 + len(dims)
    assert all(dim in (-1, size) for dim, size in zip(dims, tensor.shape[1:], strict=True))


def texts_of(bundle):
    return [row["text"] for row in json.loads((bundle / "golden.json").read_text())["sentences"]]


def golden_logits(bundle, variant):
    return np.array(json.loads((bundle / "golden.json").read_text())["logits"][variant], np.float32)


@pytest.mark.slow
@needs_triton
def test_triton_reads_the_configurations_of_a_bundle(bundle):
    configs = read_configs(bundle)
    assert set(configs) == {"onnx-int8", "onnx-int8_text", "onnx-fp32", "onnx-fp32_text", "tokenizer"}
    for name, config in configs.items():
        assert config["name"] == name
        assert config["max_batch_size"] == 32
        assert (bundle / "repository" / name / "1").is_dir()
        if name.endswith("_text"):
            assert config["platform"] == "ensemble"
            continue
        assert config["backend"] == "onnxruntime"
        assert "max_queue_delay_microseconds" in config["dynamic_batching"]
        # With KIND_AUTO, Triton may run a model on a GPU; of the bundle's models, only onnx-fp32 has GPU kernels.
        # KIND_AUTO is the default, so the configuration leaves it out.
        kind = config["instance_group"][0].get("kind", "KIND_AUTO")
        assert kind == ("KIND_AUTO" if name == "onnx-fp32" else "KIND_CPU")
    label_files = {spec["name"]: spec.get("label_filename") for spec in configs["onnx-int8"]["output"]}
    assert label_files == {"logits": None, "probabilities": "labels.txt"}
    assert (bundle / "repository" / "onnx-int8" / "labels.txt").read_text() == "NEGATIVE\nPOSITIVE\n"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("variant", ["onnx-int8", "onnx-fp32"])
@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_steps_of_an_ensemble_give_the_golden_logits(bundle, variant, size):
    configs = read_configs(bundle)
    ensemble = configs[f"{variant}_text"]
    texts = texts_of(bundle)
    for start in range(0, len(texts), size):
        tensors = {"text": np.array([[text] for text in texts[start : start + size]], dtype=object)}
        require_dims(tensors["text"], ensemble["input"][0])
        for step in ensemble["ensemble_scheduling"]["step"]:
            batch = {inner: tensors[outer] for inner, outer in step["input_map"].items()}
            results = run_model(bundle, configs[step["model_name"]], batch)
            tensors |= {outer: results[inner] for inner, outer in step["output_map"].items()}
        for spec in ensemble["output"]:
            require_dims(tensors[spec["name"]], spec)
        expected = golden_logits(bundle, variant)[start : start + size]
        assert np.abs(tensors["logits"] - expected).max() < (1e-3 if variant == "onnx-fp32" else 0.5)
        assert np.allclose(tensors["probabilities"], label_probabilities(tensors["logits"], SINGLE), atol=1e-6)


@pytest.mark.slow
@needs_triton
def test_the_tokenizer_pads_to_a_few_widths(bundle):
    config = read_configs(bundle)["tokenizer"]
    widths = {
        run_model(bundle, config, {"text": np.array([[text]], dtype=object)})["input_ids"].shape[1]
        for text in ("a film", "a rather longer film", "word " * 20, "word " * 600)
    }
    assert widths == {16, 32, 512}


@pytest.mark.slow
@needs_triton
def test_a_model_that_takes_texts_needs_no_ensemble(text_bundle):
    configs = read_configs(text_bundle)
    assert set(configs) == {"onnx-int8"}
    texts = texts_of(text_bundle)
    results = run_model(text_bundle, configs["onnx-int8"], {"text": np.array([[text] for text in texts], dtype=object)})
    assert np.abs(results["logits"] - golden_logits(text_bundle, "onnx-int8")).max() < 0.5
    assert np.allclose(results["probabilities"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.slow
@needs_triton
def test_a_repository_can_have_any_number_of_labels(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "many", labels=[f"label {i}" for i in range(7)], leaning=3.0)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    make(workspace, tmp_path / "b", "onnx-fp32", license="MIT")
    configs = read_configs(tmp_path / "b")
    assert {tuple(spec["dims"]) for spec in configs["onnx-fp32"]["output"]} == {("7",)}
    encoder = encoding.Encoder.open(tmp_path / "b", ("input_ids", "attention_mask"), 512)
    batch = encoding.pad(encoder.encode(["a film", "another"]), encoder.names, 0)
    results = run_model(tmp_path / "b", configs["onnx-fp32"], batch)
    assert np.allclose(results["probabilities"], label_probabilities(results["logits"], MULTI), atol=1e-6)


@pytest.mark.slow
def test_the_inference_service_names_the_model_and_its_format(bundle):
    service = yaml.safe_load((bundle / "inference-service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] == "triton"
    assert model["protocolVersion"] == "v2"
    assert service["metadata"]["name"] == served_name(json.loads((bundle / "bundle.json").read_text())["model"]["name"])


@pytest.mark.parametrize(("name", "label"), [("onnx-int8+tune", "onnx-int8-tune"), ("Org/My_Model", "org-my-model")])
def test_a_served_name_is_valid_in_an_address(name, label):
    assert served_name(name) == label


@pytest.mark.slow
def test_the_readme_has_the_address_of_the_model(bundle, text_bundle):
    assert "localhost:8000/v2/models/onnx-int8_text/infer" in (bundle / "README.md").read_text()
    assert "localhost:8000/v2/models/onnx-int8/infer" in (text_bundle / "README.md").read_text()
    assert LIBRARY in (text_bundle / "README.md").read_text()


@pytest.mark.slow
def test_verify_finds_another_tokenizer(bundle, tmp_path):
    report = shipping.verify(bundle)
    assert set(report["models"]) == {"onnx-int8", "onnx-fp32"}
    copy = shutil.copytree(bundle, tmp_path / "copy")
    body = json.loads((copy / "bundle.json").read_text())
    # The replaced tokenizer graph gives different tokens, but bundle.json lists its correct digest.
    from toolchain import passes
    from toolchain.ship import tokenizer_graph

    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(copy / "config.json", tmp_path / "other")
    encoder = encoding.Encoder.open(tmp_path / "other", ("input_ids", "attention_mask"), 512)
    file = copy / body["tokenizer_in_graph"]["file"]
    passes.write(tokenizer_graph.token_model(encoder, 16), file)
    from toolchain.artifacts.store import sha256

    for entry in body["files"]:
        if entry["path"] == body["tokenizer_in_graph"]["file"]:
            entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    body["id"] = bundled.canonical_id(body)
    (copy / "bundle.json").write_text(json.dumps(body))
    with pytest.raises(VerdictError, match="the tokenizer graph splits"):
        shipping.verify(copy)


@pytest.mark.slow
def test_a_tokenizer_graph_that_does_not_load_makes_a_bundle_invalid(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    body = json.loads((copy / "bundle.json").read_text())
    (copy / body["tokenizer_in_graph"]["file"]).write_bytes(b"no model")
    with pytest.raises(bundled.InvalidBundleError, match="the tokenizer graph does not run on this machine"):
        list(bundled.compare_logits(copy, body))


def test_a_label_cannot_have_the_name_of_an_ensemble():
    assert served_name("onnx-int8+text") != "onnx-int8_text"


def test_an_existing_repository_is_not_overwritten(built_tiny, tmp_path):
    (tmp_path / "models" / "repository" / "mine" / "1").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="exists and is not a bundle"):
        make(built_tiny, tmp_path / "models", "onnx-int8")
    assert (tmp_path / "models" / "repository" / "mine" / "1").is_dir()
