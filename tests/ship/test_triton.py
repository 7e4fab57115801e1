"""Runs bundles for servers in Triton, with a Python stand-in for Triton's ONNX Runtime backend."""

import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from servers import call, free_port, missing, read_rows, request, triton, triton_process

from toolchain.backends.ort import session_options
from toolchain.data import encoding, inputs
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
INT8, FP32 = "onnx-int8", "onnx-fp32"
INFER = f"models/{INT8}_text/infer"


@pytest.fixture(scope="module")
def bundle(built_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "bundle"
    shipping.ship(built_tiny, Order((INT8, FP32), "server"), folder, lambda line: None, no_bar)
    return folder


@pytest.fixture(scope="module")
def port(bundle, tmp_path_factory):
    """The port of a Triton that serves the repository of the bundle unchanged."""
    with triton(bundle / "repository", tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture(scope="module")
def texts():
    return list(inputs.load_embedded().texts[:300])


def compute_logits(bundle, variant, texts):
    """Returns the logits of the model in Python, one text at a time."""
    file = bundle / "repository" / variant / "1" / "model.onnx"
    session = ort.InferenceSession(str(file), session_options(1), providers=["CPUExecutionProvider"])
    encoder = encoding.Encoder.open(bundle, [value.name for value in session.get_inputs()], 512)
    batches = (encoding.pad(encoder.encode([text]), encoder.names, encoder.pad_id) for text in texts)
    return np.concatenate([session.run(["logits"], batch)[0] for batch in batches])


def test_triton_serves_the_ensembles_of_a_bundle(port):
    for variant in (INT8, FP32):
        status, metadata = call(port, f"models/{variant}_text")
        assert (status, metadata["platform"]) == (200, "ensemble")
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
        assert {output["name"]: output["shape"] for output in metadata["outputs"]} == {
            "logits": [-1, 2],
            "probabilities": [-1, 2],
        }


@pytest.mark.parametrize("variant", [INT8, FP32])
def test_answers_of_triton_equal_those_of_python(bundle, port, texts, variant):
    answers = [call(port, f"models/{variant}_text/infer", request(text)) for text in texts]
    assert {status for status, _ in answers} == {200}
    logits = np.array([read_rows(answer, "logits")[0] for _, answer in answers])
    assert np.allclose(logits, compute_logits(bundle, variant, texts), atol=1e-3)


def test_triton_merges_requests_and_loses_none(bundle, port, texts):
    """The scales of onnx-fp32 do not depend on the other texts of a batch, so merged answers equal Python's."""
    barrier = threading.Barrier(16)

    def classify(number):
        barrier.wait(30)
        return [call(port, f"models/{FP32}_text/infer", request(text)) for text in texts[number::16]]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(classify, range(16)))
    logits = np.empty((len(texts), 2))
    for number, answered in enumerate(answers):
        assert {status for status, _ in answered} == {200}
        logits[number::16] = [read_rows(answer, "logits")[0] for _, answer in answered]
    assert np.allclose(logits, compute_logits(bundle, FP32, texts), atol=1e-3)
    statistics = call(port, f"models/{FP32}/stats")[1]["model_stats"][0]["batch_stats"]
    assert max(each["batch_size"] for each in statistics) > 1


def test_triton_adds_the_labels_to_classes(port):
    output = {"name": "probabilities", "parameters": {"classification": 2}}
    _, answer = call(port, INFER, {**request("a film"), "outputs": [output]})
    classes = answer["outputs"][0]["data"]
    assert {each.split(":")[2] for each in classes} == {"NEGATIVE", "POSITIVE"}


@pytest.mark.parametrize(
    ("body", "status", "cause"),
    [
        ({"inputs": []}, 400, r"missing required input\(s\) \['text'\]"),
        (request(*["a film"] * 33), 400, "batch-size must be <= 32"),
        ({"inputs": [{**request("a")["inputs"][0], "name": "texts"}]}, 400, "unexpected inference input 'texts'"),
        ({"inputs": [{**request("a")["inputs"][0], "shape": [1]}]}, 400, r"Expected \[-1,1\], got \[1\]"),
        ({"inputs": [{**request("a")["inputs"][0], "shape": [2, 1]}]}, 400, "expected 2 string elements"),
        (
            {"inputs": [{"name": "text", "datatype": "INT64", "shape": [1, 1], "data": [1]}]},
            400,
            "data-type is 'INT64', but model 'onnx-int8_text' expects 'BYTES'",
        ),
        (b"no JSON", 500, "failed to parse the request JSON"),
    ],
)
def test_triton_names_what_is_wrong_with_a_request(port, body, status, cause):
    actual, answer = call(port, INFER, body)
    assert actual == status
    assert re.search(cause, answer["error"])
    assert call(port, INFER, request("a film"))[0] == 200


def test_triton_names_a_taken_port(bundle, port, tmp_path):
    with triton_process(bundle / "repository", tmp_path, port) as (process, log):
        assert process.wait(60) == 1
        assert f"Socket '127.0.0.1:{port}' already in use" in log.read_text()


def test_triton_names_an_unknown_field_of_another_release(bundle, tmp_path):
    repository = shutil.copytree(bundle / "repository", tmp_path / "repository")
    config = repository / "tokenizer" / "config.pbtxt"
    config.write_text(config.read_text() + "field_of_another_release: 1\n")
    with triton_process(repository, tmp_path, free_port()) as (process, log):
        assert process.wait(60) == 1
        assert 'has no field named "field_of_another_release"' in log.read_text()
