"""Runs bundles with `serve run` and `serve deploy` of Ray Serve on loopback; `make test-clients` installs Ray Serve."""

import http.client
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import TESTS
from readme_parts import snippet
from servers import (
    RAY_SERVE,
    call,
    call_path,
    free_port,
    ray_configuration,
    ray_environment,
    ray_process,
    ray_serve,
    read_rows,
    request,
    wait_until_ready,
)

import toolchain as tc
from toolchain.data import inputs
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.shipping import Order

needs_ray_serve = pytest.mark.skipif(not RAY_SERVE.exists(), reason="needs `make test-clients`")
pytestmark = [pytest.mark.slow, needs_ray_serve]
INT8, FP32 = "onnx-int8", "onnx-fp32"
INFER = f"models/{INT8}/infer"
TENSOR = request("a film")["inputs"][0]
MAX_BODY_BYTES = 1 << 20
ONGOING = 4  # `max_ongoing_requests` of the cluster's replicas
LOAD = 16  # clients; so the replicas hold at most 2 * ONGOING of their requests, and the others wait
# A cluster that starts a second replica after a second of load, and keeps it.
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 600,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
}


def ship(workspace, folder, *names, **order):
    shipping.ship(workspace, Order(names, "ray-serve", **order), folder, lambda line: None, no_bar)
    return folder


@pytest.fixture(scope="module")
def bundle(built_tiny, tmp_path_factory):
    """A bundle; in the end, it must be unmodified."""
    folder = ship(built_tiny, tmp_path_factory.mktemp("ray-serve") / "bundle", INT8, FP32)
    yield folder
    bundled.read_bundle(folder)


@pytest.fixture(scope="module")
def port(bundle, tmp_path_factory):
    """The port of `serve run` with the bundle's own settings."""
    with ray_serve(bundle, tmp_path_factory.mktemp("run")) as port:
        yield port


@pytest.fixture(scope="module")
def expected(built_tiny):
    """A function that returns the predictions of 300 sentences by `toolchain.Classifier`, one sentence at a time."""
    texts = list(inputs.load_embedded().texts[:300])

    def predict(variant):
        with tc.Classifier(built_tiny.load(variant), threads=1) as classifier:
            return texts, [classifier(text) for text in texts]

    return predict


def run_app(command, *bundles):
    """Runs `serve_app.py` of bundles without a cluster; see tests/clients/ray_serve_app.py."""
    command = [RAY_SERVE, TESTS / "clients" / "ray_serve_app.py", command, *bundles]
    with tempfile.TemporaryDirectory() as temporary:
        environment = ray_environment(temporary, TOOLCHAIN_THREADS="1")
        run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def probabilities(predictions):
    return np.array([list(each.probabilities.values()) for each in predictions])


def change_task(folder, task):
    """Changes the task in bundle.json, with the right id, so that the runner converts the same logits otherwise."""
    body = json.loads((folder / "bundle.json").read_text()) | {"task": task}
    (folder / "bundle.json").write_text(json.dumps(body | {"id": bundled.canonical_id(body)}))


def test_the_server_describes_itself_and_its_models(port):
    assert call_path(port, "/v2")[1]["name"] == "ray-serve"
    assert call(port, "health/live") == (200, {"live": True})
    assert call(port, "health/ready") == (200, {"ready": True})
    assert call(port, "models") == (200, {"models": [INT8, FP32]})
    for name in (INT8, FP32):
        metadata = call(port, f"models/{name}")[1]
        assert metadata["name"] == name
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
        assert metadata["outputs"] == [
            {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        ]
        assert call(port, f"models/{name}/ready") == (200, {"name": name, "ready": True})


def test_answers_to_single_sentences_equal_those_of_the_toolchain(expected, port):
    texts, predictions = expected(INT8)
    answers = [call(port, INFER, request(text)) for text in texts]
    assert {status for status, _ in answers} == {200}
    rows = np.array([read_rows(answer, "probabilities")[0] for _, answer in answers])
    assert np.allclose(rows, probabilities(predictions), atol=1e-5)
    assert [read_rows(answer, "label")[0][0] for _, answer in answers] == [each.label for each in predictions]


def test_sentences_that_run_in_batches_get_the_answers_of_single_ones(expected, port):
    """In fp32, the other sentences of a batch change no answer."""
    texts, predictions = expected(FP32)
    requests = [texts[start : start + 5] for start in range(0, 300, 5)]
    barrier = threading.Barrier(12)

    def ask(number):
        barrier.wait(30)
        answers = [(i, call(port, f"models/{FP32}/infer", request(*requests[i]))) for i in range(number, 60, 12)]
        return [(i, status, read_rows(answer, "probabilities")) for i, (status, answer) in answers]

    with ThreadPoolExecutor(12) as pool:
        answers = sorted(each for part in pool.map(ask, range(12)) for each in part)
    assert {status for _, status, _ in answers} == {200}
    rows = np.array([row for _, _, part in answers for row in part])
    assert np.allclose(rows, probabilities(predictions), atol=1e-5)


def test_the_server_answers_the_request_of_the_readme_and_of_the_page(bundle, port):
    found = re.search(r"curl localhost:8000/v2/(\S+) -d '\n(.*?)'\n", (bundle / "README.md").read_text(), re.S)
    status, answer = call(port, found[1], found[2].encode())
    assert status == 200
    assert read_rows(answer, "label")[0][0] in ("NEGATIVE", "POSITIVE")
    code = snippet("ray-serve").replace("localhost:8000", f"127.0.0.1:{port}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([RAY_SERVE, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.replace("'", '"'))[0]["name"] == "label"


def test_a_request_can_choose_outputs_and_has_its_id(port):
    for names in (["label"], ["probabilities"], ["probabilities", "label"]):
        body = {**request("a film"), "id": "seven", "outputs": [{"name": name} for name in names]}
        answer = call(port, INFER, body)[1]
        assert {output["name"] for output in answer["outputs"]} == set(names)
        assert answer["id"] == "seven"


@pytest.mark.parametrize(
    ("path", "body", "status", "cause"),
    [
        ("models/other/infer", request("a film"), 404, "has no model 'other'. Use onnx-int8 or onnx-fp32"),
        ("models/other", None, 404, "has no model 'other'"),
        ("models/other/ready", None, 404, "has no model 'other'"),
        (f"models/{INT8}/infer", None, 404, "has no GET"),
        (f"models/{INT8}/versions/1/infer", request("a film"), 404, "has no POST"),
        (f"repository/models/{INT8}/unload", {}, 404, "has no POST"),
        (INFER, {"inputs": []}, 400, r"has the inputs \[\] instead of one input 'text'"),
        (INFER, {"inputs": [TENSOR, TENSOR]}, 400, r"\['text', 'text'\] instead of one input"),
        (INFER, {"inputs": [{**TENSOR, "name": "texts"}]}, 400, r"has the inputs \['texts'\]"),
        (INFER, {"inputs": [{**TENSOR, "datatype": "INT64", "data": [1]}]}, 400, "'INT64' instead of 'BYTES'"),
        (INFER, {"inputs": [{**TENSOR, "shape": [2]}]}, 400, r"has the shape \[2\], but its data has \[1, 1\]"),
        (INFER, {"inputs": [{**TENSOR, "shape": [2, 1]}]}, 400, r"has the shape \[2, 1\]"),
        (INFER, {"inputs": [{**TENSOR, "data": [1]}]}, 400, "value that is not text"),
        (INFER, {"inputs": [{**TENSOR, "data": [None]}]}, 400, "value that is not text"),
        (INFER, {"inputs": [{**TENSOR, "data": ["\ud800"]}]}, 400, "half of a surrogate pair"),
        (INFER, {"inputs": [{**TENSOR, "data": "a film"}]}, 400, "data is not a list"),
        (INFER, {"inputs": "text"}, 400, "body has no inputs"),
        (INFER, {"inputs": ["text"]}, 400, "body has no inputs"),
        (INFER, {**request("a film"), "id": 7}, 400, "id is not text"),
        (INFER, {**request("a film"), "outputs": "label"}, 400, "outputs are not a list of objects"),
        (INFER, {**request("a film"), "outputs": [{"name": "logits"}]}, 400, "has no output 'logits'"),
        (INFER, request(), 400, "has 0 texts instead of 1 to 32"),
        (INFER, request(*["a film"] * 33), 400, "has 33 texts instead of 1 to 32"),
        (INFER, request("a" * 65_537), 400, "has 65537 characters instead of at most 65536"),
        (INFER, {"instances": ["a film"]}, 400, "body has no inputs"),
        (INFER, [], 400, "not a JSON object"),
        (INFER, b"no JSON", 400, "body is not JSON"),
        (INFER, b"[" * 100_000, 400, "body is not JSON"),
        (INFER, b"\xff\xfe", 400, "body is not JSON"),
        (INFER, b"", 400, "body is not JSON"),
        (INFER, b" " * (MAX_BODY_BYTES + 1), 413, "more than 1048576 bytes"),
        (INFER, b" " * (16 * MAX_BODY_BYTES), 413, "more than 1048576 bytes"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_request(port, path, body, status, cause):
    actual, answer = call(port, path, body)
    assert (actual, list(answer)) == (status, ["error"])
    assert re.search(cause, answer["error"])
    assert call(port, INFER, request("a" * 65_536))[0] == 200


def test_binary_tensors_are_refused(port):
    headers = {"Inference-Header-Content-Length": "10"}
    status, answer = call_path(port, f"/v2/{INFER}", request("a film"), headers)
    assert (status, "reads no binary tensors" in answer["error"]) == (400, True)


@contextmanager
def ray_head(bundle, folder):
    """Starts a Ray cluster on this machine, with two CPUs, and yields two functions.

    The first function runs the command `serve`. The second function asks the cluster for the state of the application.
    """
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        environment = ray_environment(temporary, PYTHONPATH=str(bundle))
        command = [RAY_SERVE.parent / "ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
        command += ["--port", gcs, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
        command += ["--ray-client-server-port", client]
        command += ["--num-cpus", 2, "--object-store-memory", 100_000_000, "--temp-dir", temporary]
        headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}

        def serve(*arguments):
            words = [RAY_SERVE.parent / "serve", *arguments, "--address", f"http://127.0.0.1:{dashboard}"]
            for turn in range(3):  # on a busy machine, the start of Ray Serve can exceed a time limit of Ray
                run = subprocess.run(
                    list(map(str, words)), env=environment, capture_output=True, text=True, check=False
                )
                if run.returncode == 0:
                    break
                assert turn < 2, run.stderr

        def state():
            return call_path(dashboard, "/api/serve/applications/", headers=headers)[1]["applications"]["classifier"]

        with ray_process(command, folder / "ray.log", environment) as (process, log):
            wait_until_ready(dashboard, process, log, "/api/version", headers)
            yield serve, state


def wait_for(condition, seconds=120):
    """Returns the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


class Clients:
    """Clients that send sentences one after the other until `stop`; each notes its answers by status."""

    def __init__(self, port, labels):
        self._port, self._labels, self._is_over = port, labels, threading.Event()
        self.may_send = threading.Event()
        self.may_send.set()
        self.statuses, self.wrong = [Counter() for _ in range(LOAD)], []
        self._pool = ThreadPoolExecutor(LOAD)
        self._running = [self._pool.submit(self._run, number) for number in range(LOAD)]

    def _run(self, number):
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        for turn, (text, label) in enumerate(self._labels * 1000):
            self.may_send.wait()
            if self._is_over.is_set():
                break
            client.request("POST", f"/v2/models/{FP32}/infer", json.dumps({**request(text), "id": f"{number}-{turn}"}))
            response = client.getresponse()
            content = response.read()
            self.statuses[number][response.status] += 1
            if response.status == 200:
                answer = json.loads(content)
                if (answer["id"], read_rows(answer, "label")[0][0]) != (f"{number}-{turn}", label):
                    self.wrong.append((text, answer))
        client.close()

    def total(self):
        """Returns the number of answers with each status."""
        return sum(self.statuses, Counter())

    def stop(self):
        """Ends all clients; raises the error of a client that got no answer."""
        self._is_over.set()
        self.may_send.set()
        for each in self._running:
            each.result(60)
        self._pool.shutdown()


def test_serve_deploy_scales_and_a_killed_replica_loses_only_its_own_requests(bundle, expected, tmp_path):
    texts, predictions = expected(FP32)
    # Where both labels are about equally probable, another rounding may choose the other label.
    pairs = zip(texts, predictions, strict=True)
    labels = [(text, each.label) for text, each in pairs if max(each.probabilities.values()) > 0.51]
    port = free_port()
    settings = {"autoscaling_config": SCALING, "max_ongoing_requests": ONGOING}
    configuration = ray_configuration(bundle, tmp_path / "serve.yaml", port, **settings)
    with ray_head(bundle, tmp_path) as (serve, state):

        def server():
            return state()["deployments"].get("Server", {"replicas": []})

        def running(count):
            pids = [replica["pid"] for replica in server()["replicas"] if replica["state"] == "RUNNING"]
            return pids if len(pids) == count else None

        serve("deploy", configuration)
        wait_for(lambda: running(1))
        clients = Clients(port, labels)
        wait_for(lambda: server()["target_num_replicas"] == 2)
        clients.may_send.clear()  # so that the second replica gets the processor for its start
        first, second = wait_for(lambda: running(2))
        clients.may_send.set()
        time.sleep(1)  # so that both replicas have requests
        psutil.Process(first).kill()
        answered = clients.total()[200]
        wait_for(lambda: clients.total()[200] > answered + 5 * LOAD)
        clients.stop()
        pids = wait_for(lambda: pids if (pids := running(2)) and first not in pids else None)
        assert second in pids
        assert not clients.wrong
        statuses = clients.total()
        # All waiting requests and all later ones were answered.
        assert set(statuses) <= {200, 500}
        assert statuses[500] <= ONGOING
        assert all(each[500] <= 1 for each in clients.statuses)

        # Other settings for the running application: one replica, and requests that find no place get an error.
        settings |= {"autoscaling_config": {**SCALING, "max_replicas": 1}, "max_queued_requests": 1}
        serve("deploy", ray_configuration(bundle, tmp_path / "serve.yaml", port, **settings))
        assert wait_for(lambda: running(1))[0] in pids
        clients = Clients(port, labels)
        wait_for(lambda: clients.total()[503] and clients.total()[200])
        clients.stop()
        assert set(clients.total()) == {200, 503}
        assert not clients.wrong


def test_requests_that_wait_form_batches_and_faults_are_noticed(bundle):
    (*settings, health), outcomes = run_app("check", bundle)
    assert len(settings) == 4
    assert all("Set only max_batch_size, from 1 to 1024." in each for each in settings)
    assert health == "The model onnx-int8 returns a score that is not a number."
    assert outcomes["merged"] == {
        "answers": [[5], [1], [2, 3], [4, 1], [1], [4]],
        "batches": [["first"], ["a", "bb", "ccc"], ["dddd", "e", "f"], ["last"]],
    }
    assert outcomes["alone"] == {
        "answers": [[5], [1], [2, 3], [1], [4]],
        "batches": [["first"], ["a"], ["bb", "ccc"], ["d"], ["last"]],
    }
    assert outcomes["error"] == {
        "answers": [[5], "OSError", "OSError", [1], [4]],
        "batches": [["first"], ["a", "bad"], ["b"], ["last"]],
    }
    assert outcomes["cancelled"] == {
        "answers": [[5], [1], "CancelledError", [1], [4]],
        "batches": [["first"], ["a", "c"], ["last"]],
    }


def test_a_modified_bundle_is_not_served(bundle, tmp_path):
    modified, incomplete = (shutil.copytree(bundle, tmp_path / name) for name in ("modified", "incomplete"))
    with (modified / "classify.py").open("a") as file:
        file.write("raise SystemExit('the changed file ran')\n")
    (incomplete / "bundle.json").unlink()
    changed, missing, good = run_app("start", modified, incomplete, bundle)
    assert re.match(r"InvalidBundleError: classify.py has \d+ bytes instead of \d+\.", changed)
    assert missing.startswith("FileNotFoundError")
    assert good is None


def test_models_of_other_tasks_have_other_outputs(built_tiny, tmp_path):
    """The graphs of the second bundle contain the tokenizer."""
    folders = [ship(built_tiny, tmp_path / "scores", FP32), ship(built_tiny, tmp_path / "b", FP32, with_tokenizer=True)]
    with tc.Classifier(built_tiny.load(FP32), threads=1) as classifier:
        expected = probabilities(classifier(["a film", "café naïve"]))
    for folder, task in zip(folders, ("regression", "multi_label_classification"), strict=True):
        change_task(folder, task)
    answers = run_app("answer", *folders)
    assert [status for status, _ in answers] == [200, 200]
    names = [[output["name"] for output in answer["outputs"]] for _, answer in answers]
    assert names == [["logits"], ["probabilities"]]
    odds = np.exp(read_rows(answers[0][1], "logits"))
    assert np.allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-5)
    assert np.allclose(read_rows(answers[1][1], "probabilities"), expected, atol=1e-5)


def test_the_configuration_fits_the_limits_of_the_code(bundle):
    body = yaml.safe_load((bundle / "serve.yaml").read_text())
    (application,) = body["applications"]
    (deployment,) = application["deployments"]
    assert deployment["user_config"]["max_batch_size"] <= deployment["max_ongoing_requests"]
    module, name = application["import_path"].split(":")
    code = (bundle / f"{module}.py").read_text()
    assert f"\n{name} = serve.deployment()({deployment['name']}).bind()\n" in code
    assert body["http_options"]["host"] == "127.0.0.1"


def test_the_bill_of_materials_lists_the_packages_of_the_server(bundle):
    components = json.loads((bundle / "mlbom.json").read_text())["components"]
    assert {"ray", "starlette", "onnxruntime", "tokenizers"} <= {each["name"] for each in components}
    assert not list(Path(bundle).rglob("__pycache__"))
