"""Runs the predictor of bundles for servers in KServe's model server, which `make test-clients` installs."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS
from servers import KSERVE, call, free_port, kserve, kserve_process, read_rows, request, wait_until_ready

from toolchain.data import inputs
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files import classify, classify_text
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.shipping import Order
from toolchain.ship.targets import BUNDLE_FILES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KSERVE.exists(), reason="needs `make test-clients`")]
INT8, FP32 = "onnx-int8", "onnx-fp32"
INFER = f"models/{INT8}_text/infer"
TENSOR = request("a film")["inputs"][0]
MAX_BODY_BYTES = 1 << 20


def ship(workspace, folder, *names, **order):
    shipping.ship(workspace, Order(names, "server", **order), folder, lambda line: None, no_bar)
    return folder


@pytest.fixture(scope="module")
def bundle(built_tiny, tmp_path_factory):
    return ship(built_tiny, tmp_path_factory.mktemp("kserve") / "bundle", INT8, FP32)


@pytest.fixture(scope="module")
def port(bundle, tmp_path_factory):
    """The port of a server of the bundle; in the end, the bundle must be unmodified."""
    with kserve(bundle, tmp_path_factory.mktemp("server")) as port:
        yield port
    bundled.read_bundle(bundle)


@pytest.fixture(scope="module")
def texts():
    return list(inputs.load_embedded().texts[:300])


@pytest.fixture
def runner(bundle, monkeypatch):
    """A function that loads the runner of a variant in this process, with one thread like the server."""
    monkeypatch.setenv("TOOLCHAIN_THREADS", "1")
    return lambda variant: classify.Classifier(bundle, variant)


def probabilities(scores):
    return np.array([list(row.values()) for row in scores])


def change_task(folder, task):
    """Changes the task in bundle.json, with the right id, so that the runner converts the same logits otherwise."""
    body = json.loads((folder / "bundle.json").read_text()) | {"task": task}
    (folder / "bundle.json").write_text(json.dumps(body | {"id": bundled.canonical_id(body)}))


def test_the_server_has_the_names_and_the_input_of_the_triton_repository(bundle, port):
    names = [file.parent.name for file in (bundle / "repository").glob("*_text/config.pbtxt")]
    assert sorted(call(port, "models")[1]["models"]) == sorted(names)
    for name in names:
        metadata = call(port, f"models/{name}")[1]
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
        assert metadata["outputs"] == [
            {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        ]
        assert call(port, f"models/{name}/ready")[0] == 200


@pytest.mark.parametrize("variant", [INT8, FP32])
def test_answers_of_the_server_equal_those_of_python(runner, port, texts, variant):
    answers = [call(port, f"models/{variant}_text/infer", request(text)) for text in texts]
    assert {status for status, _ in answers} == {200}
    classifier = runner(variant)
    expected = [classifier([text])[0] for text in texts]
    rows = np.array([read_rows(answer, "probabilities")[0] for _, answer in answers])
    assert np.allclose(rows, probabilities(expected), atol=1e-3)
    labels = [read_rows(answer, "label")[0][0] for _, answer in answers]
    # Where both labels are about equally probable, another rounding may choose the other label.
    sure = [label for row, label in zip(expected, labels, strict=True) if max(row.values()) > 0.51]
    assert sure == [max(row, key=row.get) for row in expected if max(row.values()) > 0.51]
    assert len(sure) > 200


@pytest.mark.parametrize("size", [2, 32])
def test_the_texts_of_a_request_are_one_batch(runner, port, texts, size):
    status, answer = call(port, INFER, {**request(*texts[:size]), "id": "seven"})
    assert (status, answer["id"]) == (200, "seven")
    rows = np.array(read_rows(answer, "probabilities"))
    assert np.allclose(rows, probabilities(runner(INT8)(texts[:size])), atol=1e-3)


def test_requests_at_the_same_time_change_no_answer(port, texts):
    alone = [call(port, INFER, request(text))[1]["outputs"] for text in texts[:160]]
    barrier = threading.Barrier(16)

    def ask(number):
        barrier.wait(30)
        return [call(port, INFER, request(text)) for text in texts[number:160:16]]

    with ThreadPoolExecutor(16) as pool:
        for number, answers in enumerate(pool.map(ask, range(16))):
            assert {status for status, _ in answers} == {200}
            assert [answer["outputs"] for _, answer in answers] == alone[number:160:16]


def test_the_server_answers_the_request_of_the_readme(bundle, port):
    """The README shows one request for Triton and this server; curl sends it without a JSON content type."""
    path, body = re.search(
        r"curl localhost:8000/v2/(\S+) -d '\n(.*?)'\n", (bundle / "README.md").read_text(), re.S
    ).groups()
    status, answer = call(port, path, body.encode())
    assert status == 200
    assert read_rows(answer, "label")[0][0] in ("NEGATIVE", "POSITIVE")


def test_a_request_can_choose_outputs(port):
    for names in (["label"], ["probabilities"], ["probabilities", "label"]):
        answer = call(port, INFER, {**request("a film"), "outputs": [{"name": name} for name in names]})[1]
        assert {output["name"] for output in answer["outputs"]} == set(names)


@pytest.mark.parametrize(
    ("path", "body", "status", "cause"),
    [
        ("models/other/infer", request("a film"), 404, "name other does not exist"),
        (f"models/{INT8}/infer", request("a film"), 404, "does not exist"),  # this model would take tokens
        (INFER, {"inputs": []}, 400, r"has the inputs \[\] instead of one input 'text'"),
        (INFER, {"inputs": [TENSOR, TENSOR]}, 400, r"\['text', 'text'\] instead of one input"),
        (INFER, {"inputs": [{**TENSOR, "name": "texts"}]}, 400, r"has the inputs \['texts'\]"),
        (INFER, {"inputs": [{**TENSOR, "datatype": "INT64", "data": [1]}]}, 400, "'INT64' instead of 'BYTES'"),
        (INFER, {"inputs": [{**TENSOR, "shape": [1]}]}, 400, r"has the shape \[1\], but its data has \[1, 1\]"),
        (INFER, {"inputs": [{**TENSOR, "shape": [2, 1]}]}, 400, r"has the shape \[2, 1\]"),
        (INFER, {"inputs": [{**TENSOR, "data": [1]}]}, 400, "value that is not text"),
        (INFER, {"inputs": [{**TENSOR, "data": ["\ud800"]}]}, 400, "half of a surrogate pair"),
        (INFER, {"inputs": [{**TENSOR, "data": "a film"}]}, 400, "inputs.0.data: Input should be a valid list"),
        (INFER, request(), 400, "has 0 texts instead of 1 to 32"),
        (INFER, request(*["a film"] * 33), 400, "has 33 texts instead of 1 to 32"),
        (INFER, {**request("a film"), "outputs": [{"name": "logits"}]}, 400, "has no output 'logits'"),
        (INFER, {"instances": ["a film"]}, 400, "inputs: Field required"),
        (INFER, b"no JSON", 400, "not an inference request: JSON decode error"),
        (INFER, b"[" * 100_000, 400, "error parsing the body"),
        (INFER, b"\xff\xfe", 400, "not an inference request"),
        (INFER, b"", 400, "Field required"),
        (INFER, b" " * (MAX_BODY_BYTES + 1), 413, "more than 1048576 bytes"),
        (INFER, b" " * (16 * MAX_BODY_BYTES), 413, "more than 1048576 bytes"),
        (f"repository/models/{INT8}_text/unload", {}, 404, "has no POST"),
        (f"models/{INT8}_text/versions/1/infer", request("a film"), 404, "has no POST"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_request(port, path, body, status, cause):
    actual, answer = call(port, path, body)
    assert actual == status
    assert re.search(cause, answer["error"])
    assert call(port, INFER, request("a film"))[0] == 200


@pytest.mark.parametrize(
    ("headers", "chunks", "status"),
    [
        ({"Content-Type": "text/plain", "ce-id": "1", "ce-type": "x"}, 1, 200),
        ({"Inference-Header-Content-Length": "no number"}, 1, 400),
        ({"Transfer-Encoding": "chunked"}, 1, 200),
        ({"Transfer-Encoding": "chunked"}, 12_000, 413),
    ],
)
def test_headers_do_not_change_what_a_request_is(port, headers, chunks, status):
    padding = [b" " * 100] * (chunks - 1)
    body = [*padding, json.dumps(request("a film")).encode()]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    is_chunked = "Transfer-Encoding" in headers
    connection.request(
        "POST", f"/v2/{INFER}", iter(body) if is_chunked else body[0], headers, encode_chunked=is_chunked
    )
    assert connection.getresponse().status == status
    connection.close()


def run_predictor(bundle, folder, port, **environment):
    """Returns exit code and output of a predictor that does not start."""
    with kserve_process(bundle, folder, port, **environment) as (process, log):
        return process.wait(60), log.read_text()


def test_a_taken_port_gives_a_message(bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code, output = run_predictor(bundle, tmp_path, port)
    assert code == 1
    assert output == (
        f"The server cannot use port {port} of '127.0.0.1': Address already in use. "
        "Pass a free port as --port, or an address of this machine as --host.\n"
    )


@pytest.mark.parametrize(
    ("port", "threads", "message"),
    [
        ("65536", "1", "'65536' is no port. Pass a number from 1 to 65535 as --port.\n"),
        (None, "many", "TOOLCHAIN_THREADS is 'many'. Set it to a number of threads from 1 to 9999.\n"),
    ],
)
def test_a_wrong_setting_gives_a_message(bundle, tmp_path, port, threads, message):
    assert run_predictor(bundle, tmp_path, port or free_port(), TOOLCHAIN_THREADS=threads) == (1, message)


def test_a_modified_bundle_is_not_served(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with (copy / "classify.py").open("a") as file:
        file.write("raise SystemExit('the changed file ran')\n")
    code, output = run_predictor(copy, tmp_path, free_port())
    assert code == 3
    assert re.fullmatch(r"FAILED: classify.py has \d+ bytes instead of \d+\. Do not use this bundle; .*\.\n", output)
    (copy / "bundle.json").unlink()
    code, output = run_predictor(copy, tmp_path, free_port())
    assert code == 1
    assert re.fullmatch(r"The bundle cannot be read: .*bundle.json'\. Copy the whole bundle\.\n", output)


def test_the_server_uses_the_stated_number_of_threads_and_ends_on_a_signal(bundle, tmp_path):
    port = free_port()
    with kserve_process(bundle, tmp_path, port, TOOLCHAIN_THREADS="40") as (process, log):
        wait_until_ready(port, process, log)
        threads = len(list(Path(f"/proc/{process.pid}/task").iterdir()))
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in log.read_text()
    # Each of the two models has 40 threads, one of which is the caller's. The server has a few threads of its own.
    assert 2 * 39 <= threads < 2 * 39 + 30


def test_a_model_with_its_tokenizer_and_several_labels_returns_independent_probabilities(
    built_tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("TOOLCHAIN_THREADS", "1")
    folder = ship(built_tiny, tmp_path / "bundle", FP32, with_tokenizer=True)
    change_task(folder, "multi_label_classification")
    with kserve(folder, tmp_path) as port:
        answer = call(port, f"models/{FP32}/infer", request("a film", "café naïve"))[1]
    assert [output["name"] for output in answer["outputs"]] == ["probabilities"]
    expected = classify_text.Classifier(folder)(["a film", "café naïve"])
    assert np.allclose(read_rows(answer, "probabilities"), probabilities(expected), atol=1e-5)


def test_a_regression_model_returns_its_scores(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLCHAIN_THREADS", "1")
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    change_task(folder, "regression")
    with kserve(folder, tmp_path) as port:
        answer = call(port, f"models/{FP32}_text/infer", request("a film"))[1]
    assert [output["name"] for output in answer["outputs"]] == ["logits"]
    assert np.allclose(read_rows(answer, "logits"), probabilities(classify.Classifier(folder, FP32)(["a film"])))


def test_an_inference_service_has_only_fields_of_kserve(bundle, tmp_path):
    files = [bundle / "inference-service.yaml", bundle / "kserve" / "inference_service.yaml", tmp_path / "wrong.yaml"]
    files[2].write_text(files[1].read_text().replace("maxReplicas: 4", "maxreplicas: 4"))
    command = [KSERVE, TESTS / "clients" / "kserve_fields.py", *files]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    wrong = "service.spec.predictor.maxreplicas: V1beta1PredictorSpec has no such field"
    assert list(json.loads(run.stdout).values()) == [[], [], [wrong]]


def test_the_image_has_the_files_that_its_commands_name(bundle):
    lines = (bundle / "kserve" / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert [words[0] for words in instructions] == ["FROM", "COPY", "RUN", "COPY", "USER", "EXPOSE", "ENTRYPOINT"]
    _, lock, _, everything, *_ = instructions
    assert (bundle / lock[1]).read_bytes() == (BUNDLE_FILES / "requirements_kserve.lock").read_bytes()
    assert everything[2:] == [".", "/bundle"]
    script = json.loads(" ".join(instructions[-1][1:]))[1]
    assert (bundle / script.removeprefix("/bundle/")).is_file()


def test_the_bill_of_materials_lists_the_packages_of_the_server(bundle):
    components = json.loads((bundle / "mlbom.json").read_text())["components"]
    assert {"kserve", "uvicorn", "onnxruntime", "tokenizers"} <= {each["name"] for each in components}
