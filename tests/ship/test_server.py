"""Model repositories: read by Triton's own definition of them, every model asked with the shapes that it declares.

`make test-clients` installs the client whose definition that is; without it, the tests that need it are skipped.
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
from toolchain.data.labels import shares
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
    """Of two models, which take tokens; not to be changed."""
    folder = tmp_path_factory.mktemp("server") / "bundle"
    make(built_tiny, folder, "onnx-int8", "onnx-fp32")
    return folder


@pytest.fixture(scope="module")
def whole(built_tiny, tmp_path_factory):
    """Of a model that takes texts."""
    folder = tmp_path_factory.mktemp("server") / "bundle"
    make(built_tiny, folder, "onnx-int8", with_tokenizer=True)
    return folder


def read(bundle):
    command = [PYTHON, TESTS / "clients" / "triton.py", bundle / "repository"]
    return json.loads(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)


def ask(bundle, config, batch):
    """What Triton would: the model's file for a batch of the declared types and shapes; tensors by name."""
    options = session_options(1)  # Triton cannot set the one for exact products: it takes -portable files on AVX2
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        assert library == LIBRARY
        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    name = config.get("default_model_filename", "model.onnx")
    file = bundle / "repository" / config["name"] / "1" / name
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {}
    known = {value.name: value for value in session.get_inputs()}
    assert set(known) == {spec["name"] for spec in config["input"]}
    for spec in config["input"]:
        tensor = batch[spec["name"]]
        assert tensor.dtype == TYPES[spec["data_type"]]
        assert known[spec["name"]].type == ORT_TYPES[spec["data_type"]]
        check(tensor, spec)
        given[spec["name"]] = tensor.reshape(len(tensor)) if "reshape" in spec else tensor
        assert given[spec["name"]].ndim == len(known[spec["name"]].shape)
    names = [spec["name"] for spec in config["output"]]
    found = dict(zip(names, session.run(names, given), strict=True))
    for spec in config["output"]:
        assert found[spec["name"]].dtype == TYPES[spec["data_type"]]
        check(found[spec["name"]], spec)
    return found


def check(tensor, spec):
    """Whether it is a batch of the dims declared."""
    dims = [int(dim) for dim in spec["dims"]]
    assert tensor.ndim == 1 + len(dims)
    assert all(dim in (-1, size) for dim, size in zip(dims, tensor.shape[1:], strict=True))


def texts_of(bundle):
    return [row["text"] for row in json.loads((bundle / "golden.json").read_text())["sentences"]]


def wanted(bundle, variant):
    return np.array(json.loads((bundle / "golden.json").read_text())["logits"][variant], np.float32)


@pytest.mark.slow
@needs_triton
def test_triton_reads_what_the_bundle_says(bundle):
    configs = read(bundle)
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
        # What has kernels on a GPU may run there; KIND_AUTO, the default, is not spelt out.
        kind = config["instance_group"][0].get("kind", "KIND_AUTO")
        assert kind == ("KIND_AUTO" if name == "onnx-fp32" else "KIND_CPU")
    labelled = {spec["name"]: spec.get("label_filename") for spec in configs["onnx-int8"]["output"]}
    assert labelled == {"logits": None, "probabilities": "labels.txt"}
    assert (bundle / "repository" / "onnx-int8" / "labels.txt").read_text() == "NEGATIVE\nPOSITIVE\n"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("variant", ["onnx-int8", "onnx-fp32"])
@pytest.mark.parametrize("size", [1, 3, 32])
def test_an_ensemble_gives_the_golden_answers_step_by_step(bundle, variant, size):
    configs = read(bundle)
    ensemble = configs[f"{variant}_text"]
    every = texts_of(bundle)
    for start in range(0, len(every), size):
        tensors = {"text": np.array([[text] for text in every[start : start + size]], dtype=object)}
        check(tensors["text"], ensemble["input"][0])
        for step in ensemble["ensemble_scheduling"]["step"]:
            batch = {inner: tensors[outer] for inner, outer in step["input_map"].items()}
            found = ask(bundle, configs[step["model_name"]], batch)
            tensors |= {outer: found[inner] for inner, outer in step["output_map"].items()}
        for spec in ensemble["output"]:
            check(tensors[spec["name"]], spec)
        expected = wanted(bundle, variant)[start : start + size]
        assert np.abs(tensors["logits"] - expected).max() < (1e-3 if variant == "onnx-fp32" else 0.5)
        assert np.allclose(tensors["probabilities"], shares(tensors["logits"], False), atol=1e-6)


@pytest.mark.slow
@needs_triton
def test_tokens_are_as_wide_as_those_of_other_requests(bundle):
    config = read(bundle)["tokenizer"]
    widths = {
        ask(bundle, config, {"text": np.array([[text]], dtype=object)})["input_ids"].shape[1]
        for text in ("a film", "a rather longer film", "word " * 20, "word " * 600)
    }
    assert widths == {16, 32, 512}


@pytest.mark.slow
@needs_triton
def test_a_model_that_takes_texts_is_one_model(whole):
    configs = read(whole)
    assert set(configs) == {"onnx-int8"}
    every = texts_of(whole)
    found = ask(whole, configs["onnx-int8"], {"text": np.array([[text] for text in every], dtype=object)})
    assert np.abs(found["logits"] - wanted(whole, "onnx-int8")).max() < 0.5
    assert np.allclose(found["probabilities"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.slow
@needs_triton
def test_any_number_of_labels(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "many", labels=[f"label {i}" for i in range(7)], leaning=3.0)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    make(workspace, tmp_path / "b", "onnx-fp32", license="MIT")
    configs = read(tmp_path / "b")
    assert {tuple(spec["dims"]) for spec in configs["onnx-fp32"]["output"]} == {("7",)}
    encoder = encoding.Encoder.open(tmp_path / "b", ("input_ids", "attention_mask"), 512)
    batch = encoding.pad(encoder.encode(["a film", "another"]), encoder.names, 0)
    found = ask(tmp_path / "b", configs["onnx-fp32"], batch)
    assert np.allclose(found["probabilities"], shares(found["logits"], True), atol=1e-6)


@pytest.mark.slow
def test_kserve_is_told_where_it_lies(bundle):
    service = yaml.safe_load((bundle / "inference-service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] == "triton"
    assert model["protocolVersion"] == "v2"
    assert service["metadata"]["name"] == served_name(json.loads((bundle / "bundle.json").read_text())["model"]["name"])


@pytest.mark.parametrize(("name", "label"), [("onnx-int8+tune", "onnx-int8-tune"), ("Org/My_Model", "org-my-model")])
def test_names_go_into_addresses(name, label):
    assert served_name(name) == label


@pytest.mark.slow
def test_the_readme_names_what_is_asked(bundle, whole):
    assert "localhost:8000/v2/models/onnx-int8_text/infer" in (bundle / "README.md").read_text()
    assert "localhost:8000/v2/models/onnx-int8/infer" in (whole / "README.md").read_text()
    assert LIBRARY in (whole / "README.md").read_text()


@pytest.mark.slow
def test_a_bundle_checks_its_tokenizer(bundle, tmp_path):
    report = shipping.verify(bundle)
    assert set(report["models"]) == {"onnx-int8", "onnx-fp32"}
    copy = shutil.copytree(bundle, tmp_path / "copy")
    body = json.loads((copy / "bundle.json").read_text())
    # Another tokenizer in its place, well listed: it answers otherwise.
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
def test_a_tokenizer_that_does_not_load_is_a_broken_bundle(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    body = json.loads((copy / "bundle.json").read_text())
    (copy / body["tokenizer_in_graph"]["file"]).write_bytes(b"no model")
    with pytest.raises(bundled.InvalidBundleError, match="the tokenizer graph does not run here"):
        list(bundled.compare_logits(copy, body))


def test_a_label_takes_no_ensembles_place():
    assert served_name("onnx-int8+text") != "onnx-int8_text"


def test_a_repository_that_exists_is_left_alone(built_tiny, tmp_path):
    (tmp_path / "models" / "repository" / "mine" / "1").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="exists and is not a bundle"):
        make(built_tiny, tmp_path / "models", "onnx-int8")
    assert (tmp_path / "models" / "repository" / "mine" / "1").is_dir()
