"""Tests of `predict` with inputs and outputs on S3: moto, which `make test-clients` installs, serves S3 on loopback."""

import contextlib
import gzip
import json
import os
import socket
import time
import urllib.request

import pytest
from servers import CLIENTS, free_port, server_process

from toolchain.data.storage import open_file_system
from toolchain.errors import DataError
from toolchain.predict import load_variant_model
from toolchain.predict.output_folder import OutputFolder
from toolchain.predict.parts import Request, predict_parts
from toolchain.progress import no_bar

SERVER = CLIENTS / "s3" / "bin" / "moto_server"
pytestmark = pytest.mark.skipif(not SERVER.exists(), reason="needs `make test-clients`")
CSV = "id,text\n" + "".join(f"{i},film {i}\n" for i in range(10))


def quiet(line):
    pass


def send(port, method, path, body=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, method=method)
    request.add_header("Content-Type", "application/octet-stream")
    urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Starts an S3 server with an empty bucket named `bucket`."""
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    with server_process([SERVER, "-H", "127.0.0.1", "-p", port], log, dict(os.environ)) as (process, _):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        send(port, "PUT", "/bucket")
        yield port


@pytest.fixture
def s3(port, monkeypatch):
    """Sets the variables with which pyarrow finds the server; the server requires valid keys only if a test says so."""
    variables = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    variables |= {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "EC2_METADATA_DISABLED": "true"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield port
    send(port, "POST", "/moto-api/reset-auth", b"inf")


@pytest.fixture(scope="module")
def model(built_tiny):
    return load_variant_model(built_tiny, "onnx-fp32", quiet, no_bar)


def run(model, output, *inputs):
    return predict_parts(model, Request(inputs, output), quiet, no_bar)


def test_a_folder_on_s3_gives_the_parts_of_local_files(model, s3, tmp_path):
    system, root = open_file_system("s3://bucket/in/")
    (tmp_path / "in").mkdir()
    for name in ("a.csv.gz", "more/b c.csv.gz"):
        content = gzip.compress(CSV.encode())
        system.pipe_file(f"{root}/{name}", content)
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    expected = run(model, str(tmp_path / "out"), str(tmp_path / "in"))
    assert run(model, "s3://bucket/out/", "s3://bucket/in/") == expected
    assert run(model, "s3://bucket/out/", "s3://bucket/in/") == expected
    manifest = json.loads(OutputFolder("s3://bucket/out/").read("_toolchain.json"))
    names = [f"s3://bucket/in/{name}" for name in ("a.csv.gz", "more/b c.csv.gz")]
    assert [entry["name"] for entry in manifest["inputs"]] == names
    assert (manifest["rows"], manifest["digest"]) == (20, expected.digest)


def test_errors_of_s3_have_one_sentence_and_a_hint(model, s3):
    open_file_system("s3://bucket/")[0].pipe_file("bucket/a.csv", CSV.encode())
    cases = [("s3://none/in/", "s3://none/in/ does not exist"), ("s3://bucket/b.csv", r"s3://bucket/b\.csv does not")]
    for source, message in cases:
        with pytest.raises(DataError, match=message) as error:
            run(model, "s3://bucket/out-a/", source)
        assert error.value.hint
    with pytest.raises(DataError, match=r"s3://none/.*run\.json cannot be written .*bucket"):
        run(model, "s3://none/out/", "s3://bucket/a.csv")
    send(s3, "POST", "/moto-api/reset-auth", b"0")
    with pytest.raises(DataError, match=r"s3://bucket/a\.csv cannot be read .*ACCESS_DENIED") as error:
        run(model, "s3://bucket/out-b/", "s3://bucket/a.csv")
    assert "credentials" in error.value.hint
    with pytest.raises(DataError, match=r"s3://bucket/out-c/ cannot be read .*ACCESS_DENIED"):
        run(model, "s3://bucket/out-c/", __file__)
