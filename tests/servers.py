"""Starts Triton, the predictor for KServe and Ray Serve on a bundle, and sends them texts over HTTP.

The package nvidia-pytriton contains Triton but not its ONNX Runtime backend. The file
`tests/clients/triton_backend.py` stands in for this backend.
"""

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import yaml

TESTS = Path(__file__).parent
CLIENTS = TESTS.parent / "exported" / ".cache" / "test-clients"
VENV = CLIENTS / "triton"
KSERVE = CLIENTS / "kserve" / "bin" / "python"
RAY_SERVE = CLIENTS / "ray-serve" / "bin" / "python"
BACKEND_FILES = ("backends/python/libtriton_python.so", "backends/python/triton_python_backend_utils.py")
START_SECONDS = 180  # for a busy machine; a server that ends is noticed at once


def _site_packages():
    return next(iter(VENV.glob("lib/python3*/site-packages")), VENV)


def _environment():
    """Returns the environment in which Triton finds its libraries, libpython, and the packages of its backend."""
    site = _site_packages()
    command = [VENV / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    libraries = f"{site / 'nvidia_pytriton.libs'}:{folder}"
    # Python in Triton's backend finds its packages by the first `python3` on PATH.
    path = f"{VENV / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def _programs():
    """Returns the paths of Triton and of the process that runs its Python backends."""
    folder = _site_packages() / "pytriton" / "tritonserver"
    version = _site_packages().parent.name.removeprefix("python")
    return folder / "bin" / "tritonserver", folder / "python_backend_stubs" / version / "triton_python_backend_stub"


def missing():
    """Returns the reason why Triton cannot run on this machine; None if it can."""
    programs = _programs()
    if not all(program.exists() for program in programs):
        return "needs `make test-clients`"
    run = subprocess.run(["ldd", *programs], capture_output=True, text=True, env=_environment(), check=False)
    return next((line.strip() for line in (run.stdout + run.stderr).splitlines() if "not found" in line), None)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def triton_process(repository, folder, port):
    """Starts Triton on loopback with its log in `folder`, and ends it; yields the process and the path of the log."""
    server, stub = _programs()
    backend = folder / "backends" / "onnxruntime"
    backend.mkdir(parents=True)  # Triton refuses links in the folder of a backend
    for name in BACKEND_FILES:
        shutil.copy(server.parent.parent / name, backend)
    shutil.copy(stub, backend)
    shutil.copy(TESTS / "clients" / "triton_backend.py", backend / "model.py")
    command = [server, "--model-repository", repository, "--backend-directory", backend.parent]
    command += ["--http-address", "127.0.0.1", "--http-port", port, "--allow-grpc", "false", "--allow-metrics", "false"]
    with server_process(command, folder / "triton.log", _environment()) as started:
        yield started


@contextmanager
def kserve_process(bundle, folder, port, **environment):
    """Starts the predictor of a bundle on loopback with its log in `folder`, and ends it; yields as `triton_process`.

    Args:
        environment: Environment variables that replace those of this process.
    """
    command = [KSERVE, bundle / "kserve" / "predictor.py", "--host", "127.0.0.1", "--port", port]
    with server_process(
        command, folder / "kserve.log", {**os.environ, "TOOLCHAIN_THREADS": "1", **environment}
    ) as started:
        yield started


def ray_environment(temporary, **environment):
    """Returns the environment of Ray's commands: a cluster of its own, which sends nothing and needs a token.

    Args:
        temporary: Folder of Ray's sockets and logs; the path of a socket has at most 107 characters.
        environment: Further environment variables.
    """
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    own |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # otherwise a cluster needs 30 seconds to end
    # On a busy machine, Ray Serve would give up a slow start.
    own |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "120" for check in ("READY", "HEALTH")}
    others = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return {**others, **own, **environment}


def ray_configuration(bundle, file, port, **settings):
    """Writes the bundle's serve.yaml with another port, and with other settings of the deployment; returns `file`."""
    body = yaml.safe_load((bundle / "serve.yaml").read_text())
    body["http_options"]["port"] = port
    body["applications"][0]["deployments"][0] |= settings
    file.write_text(yaml.safe_dump(body))
    return file


@contextmanager
def ray_serve_process(bundle, folder, port, **settings):
    """Starts `serve run` on a bundle, with its log in `folder`, and ends it; yields as `triton_process`.

    Args:
        settings: Settings that replace those of the deployment in the bundle's serve.yaml.
    """
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        configuration = ray_configuration(bundle, folder / "serve.yaml", port, **settings)
        command = [RAY_SERVE.parent / "serve", "run", "--address", "local", configuration]
        with ray_process(command, folder / "ray.log", ray_environment(temporary), bundle) as started:
            yield started


@contextmanager
def ray_process(command, log, environment, cwd=None):
    """Starts a command that starts Ray, and ends it as `server_process`; then waits until no process of it remains."""
    children = []
    with server_process(command, log, environment, cwd) as (process, log):
        try:
            yield process, log
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
    if remaining := psutil.wait_procs(children, timeout=30)[1]:
        raise AssertionError(f"Ray did not end: {remaining}")


@contextmanager
def server_process(command, log, environment, cwd=None):
    """Starts a server and ends it; yields the process and the path of its log."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )
        try:
            yield process, log
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def triton(repository, folder):
    """Starts Triton, waits until all models are ready, and yields the port."""
    return _start(triton_process, repository, folder)


def kserve(bundle, folder):
    """Starts the predictor of a bundle, waits until all models are ready, and yields the port."""
    return _start(kserve_process, bundle, folder)


def ray_serve(bundle, folder):
    """Starts `serve run` on a bundle, waits until the models are ready, and yields the port."""
    return _start(ray_serve_process, bundle, folder)


@contextmanager
def _start(start_process, source, folder):
    port = free_port()
    with start_process(source, folder, port) as (process, log):
        wait_until_ready(port, process, log)
        yield port


def wait_until_ready(port, process, log, path="/v2/health/ready", headers=None):
    """Returns when the server answers that it is ready; raises `AssertionError` if it does not start."""
    end = time.monotonic() + START_SECONDS
    while not _is_ready(port, path, headers):
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"The server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def _is_ready(port, path, headers):
    try:
        return call_path(port, path, headers=headers)[0] == 200
    except (OSError, ValueError):  # Ray Serve answers with plain text until the application runs
        return False


def call(port, path, body=None):
    """Sends one request of the Open Inference Protocol; see `call_path`."""
    return call_path(port, f"/v2/{path}", body)


def call_path(port, path, body=None, headers=None):
    """Sends one request, in JSON unless `body` is bytes, and returns the status and the JSON of the answer.

    Args:
        headers: Headers of the request.
    """
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("GET" if body is None else "POST", path, data, headers or {})
        response = client.getresponse()
        content = response.read()
    return response.status, json.loads(content) if content else None


def request(*texts):
    """Returns the body of a request to classify texts."""
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": list(texts)}]}


def read_rows(answer, name):
    """Returns an output of an answer as a list of rows."""
    output = next(output for output in answer["outputs"] if output["name"] == name)
    width = output["shape"][1]
    return [output["data"][start : start + width] for start in range(0, len(output["data"]), width)]
