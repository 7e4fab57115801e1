"""Serves the models of this bundle with KServe: python kserve/predictor.py [--host HOST] [--port PORT].

The server answers the Open Inference Protocol v2 over REST. It serves each model of the bundle under the name that the
text model has in the Triton repository. A request has one input, ``text``: 1 to `MAX_TEXTS` texts, BYTES [texts, 1].
The answer has ``label`` and ``probabilities``; without ``label`` if a text can have several labels, and only
``logits`` for a regression model, whose logits are the scores.

The server first checks that the bundle is unmodified. The environment variable TOOLCHAIN_THREADS sets the number of
threads; otherwise the CPU quota of the container does. The server runs one request at a time, and each request is its
own batch. So other requests never change an answer.

Exit codes:
    1: A setting is wrong, the port cannot be used, or the bundle cannot be read.
    3: The bundle was modified, or this ONNX Runtime cannot compute its logits.
"""

import os
import sys

_script_folder = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":
    # Python searches the script's folder for libraries first. The script removes its folder from the search path, so
    # that no file of the bundle can replace a library.
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _script_folder]
    sys.dont_write_bytecode = True  # a __pycache__ in the bundle would be an unlisted file
    _arguments = sys.argv[1:]
    del sys.argv[1:]  # KServe reads the arguments of the program when it is imported
os.environ.setdefault("KSERVE_LOGLEVEL", "WARNING")  # on the level INFO, KServe logs the times of each request

import argparse
import asyncio
import importlib.util
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import kserve
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve.model_server import app
from starlette.exceptions import HTTPException

FOLDER = Path(_script_folder).parent  # the bundle
MAX_TEXTS = 32  # as in Triton's `max_batch_size`
MAX_BODY_BYTES = 1 << 20
# The requests that the server answers. KServe also has addresses that load and unload models.
ADDRESSES = {
    "GET": re.compile(r"/(metrics)?|/v2(/health/(live|ready)|/models(/[^/]+(/ready)?)?)?"),
    "POST": re.compile(r"/v2/models/[^/]+/infer"),
}
BINARY_HEADER = b"inference-header-content-length"
EXAMPLE = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a charming film"]}]}'
_HINT = f"Send the texts as in this example: {EXAMPLE}"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequestError(Exception):
    """A request is wrong; the exception has the status and the sentences of the answer."""

    def __init__(self, status: int, cause: str, hint: str) -> None:
        super().__init__(f"{cause}. {hint}.")
        self.status = status

    def response(self) -> JSONResponse:
        """Returns the answer, in the form of KServe's own errors."""
        return JSONResponse({"error": str(self)}, self.status)


class SettingError(Exception):
    """A setting of the server is wrong, or its port cannot be used."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(f"{cause}. {hint}.")


class Gate:
    """Passes on the requests of `ADDRESSES` with a JSON body of at most `MAX_BODY_BYTES`, and refuses the others.

    KServe would read a body of any size, and it answers damaged binary tensors with an error of the server.
    """

    def __init__(self, application: Callable[[Any, _Receive, _Send], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        """Answers one request, as ASGI defines it."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        try:
            _check_address(scope)
            messages = [{"type": "http.request", "body": await _read_body(receive), "more_body": False}]
        except RequestError as error:
            await error.response()(scope, receive, send)
            return

        async def replay() -> _Message:
            return messages.pop() if messages else await receive()

        # Like Triton, the server takes every body as JSON. Other headers could ask KServe for other formats.
        kept = [(name, value) for name, value in scope["headers"] if name in (b"host", b"content-length")]
        await self._application({**scope, "headers": [*kept, (b"content-type", b"application/json")]}, replay, send)


def _check_address(scope: Mapping[str, Any]) -> None:
    """Raises `RequestError` for a request that is not in `ADDRESSES`, and for binary tensors."""
    method, path = scope["method"], scope["path"]
    if method not in ADDRESSES or not ADDRESSES[method].fullmatch(path):
        # A terminal that shows the answer would obey control characters.
        raise RequestError(
            404, f"This server has no {method} {path[:100]!r}", "Send the request to POST /v2/models/NAME/infer"
        )
    if any(name == BINARY_HEADER for name, _ in scope["headers"]):
        raise RequestError(400, "This server reads no binary tensors", _HINT)


async def _read_body(receive: _Receive) -> bytes:
    """Returns the body of a request, or raises `RequestError` if it has more than `MAX_BODY_BYTES`."""
    body, is_complete = bytearray(), False
    while not is_complete:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(413, f"The request has more than {MAX_BODY_BYTES} bytes", "Send fewer or shorter texts")
        is_complete = not message.get("more_body", False)
    return bytes(body)


def read_texts(request: kserve.InferRequest) -> list[str]:
    """Returns the texts of a request.

    Raises:
        RequestError: The request does not have one input ``text``, or it has another type, shape, number or kind of
            texts than `EXAMPLE` shows.
    """

    def require(condition: bool, cause: str) -> None:
        if not condition:
            raise RequestError(400, cause, _HINT)

    names = [tensor.name for tensor in request.inputs]
    require(names == ["text"], f"The request has the inputs {names!r:.100} instead of one input 'text'")
    tensor = request.inputs[0]
    require(tensor.datatype == "BYTES", f"The input has the datatype {tensor.datatype!r:.40} instead of 'BYTES'")
    texts = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in tensor.data]
    require(0 < len(texts) <= MAX_TEXTS, f"The request has {len(texts)} texts instead of 1 to {MAX_TEXTS}")
    shape = [len(texts), 1]
    require(tensor.shape == shape, f"The input has the shape {tensor.shape!r:.100}, but its data has {shape}")
    require(all(isinstance(text, str) for text in texts), "The data has a value that is not text")
    # JSON can state half of a surrogate pair, which is not a character.
    is_text = all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts)
    require(is_text, "A text has half of a surrogate pair")
    return texts


class TextModel(kserve.Model):
    """One model of the bundle: takes texts, and answers with labels and probabilities.

    Args:
        name: Name of the model on the server.
        classify: Runner of the model, from classify.py of the bundle.
        pool: Thread that runs the models, so that the server can answer other addresses in the meantime.
    """

    def __init__(self, name: str, classify: Any, pool: ThreadPoolExecutor) -> None:
        super().__init__(name)
        self._classify, self._pool = classify, pool
        probabilities = "logits" if classify.task == "regression" else "probabilities"
        self._outputs = {probabilities: ("FP32", len(classify.labels))}
        if classify.task == "single_label_classification":
            self._outputs = {"label": ("BYTES", 1), **self._outputs}
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        """Returns the description of the input, in the form of the protocol."""
        return [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Returns the descriptions of the outputs, in the form of the protocol."""
        return [
            {"name": name, "datatype": datatype, "shape": [-1, width]}
            for name, (datatype, width) in self._outputs.items()
        ]

    async def predict(
        self, payload: kserve.InferRequest, headers: Mapping[str, str] | None = None, response_headers: Any = None
    ) -> kserve.InferResponse:
        """Returns the requested outputs for the texts of a request; all outputs if the request names none.

        Raises:
            RequestError: The request is wrong.
        """
        texts = read_texts(payload)
        names = [output.name for output in payload.request_outputs or []]
        if unknown := [name for name in names if name not in self._outputs]:
            known = " and ".join(self._outputs)
            raise RequestError(400, f"The model {self.name} has no output {unknown[0]!r:.100}", f"Request {known}")
        scores = await asyncio.get_running_loop().run_in_executor(self._pool, self._classify, texts)
        columns = {
            "label": [max(row, key=row.__getitem__) for row in scores],
            "probabilities": [value for row in scores for value in row.values()],
        }
        columns["logits"] = columns["probabilities"]
        outputs = [
            kserve.InferOutput(name, [len(texts), width], datatype, columns[name])
            for name, (datatype, width) in self._outputs.items()
            if not names or name in names
        ]
        return kserve.InferResponse(payload.id or "", self.name, outputs)


async def _answer_wrong_body(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answers a body that is no JSON, or no request of the protocol, with its first problem."""
    # KServe takes an `InferenceRequest` or bytes, so pydantic also reports that the body is not bytes.
    problem = next((each for each in error.errors() if "InferenceRequest" in each["loc"]), error.errors()[0])
    place = ".".join(map(str, problem["loc"][2:]))
    cause = f"The body is not an inference request: {place + ': ' if place else ''}{problem['msg']}"
    return RequestError(400, cause[:300], _HINT).response()


async def _answer_unreadable_body(request: Request, error: HTTPException) -> JSONResponse:
    return RequestError(error.status_code, str(error.detail), _HINT).response()


async def _answer_request_error(request: Request, error: RequestError) -> JSONResponse:
    return error.response()


class Server(kserve.ModelServer):
    """The REST server of KServe on an address of this machine, with `Gate` before it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False)
        self._host = host
        app.add_middleware(Gate)
        app.add_exception_handler(RequestError, _answer_request_error)
        app.add_exception_handler(RequestValidationError, _answer_wrong_body)
        app.add_exception_handler(HTTPException, _answer_unreadable_body)

    async def _serve(self) -> None:
        self._rest_server.config.host = self._host  # KServe itself has no setting for the address
        await super()._serve()


def load_module(name: str) -> ModuleType:
    """Imports a script of the bundle, without its folder in Python's search path."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_settings(host: str, port: str) -> int:
    """Checks TOOLCHAIN_THREADS and that the server can use the address; returns the port.

    Raises:
        SettingError: A setting is wrong, or the address cannot be used.
    """
    threads = os.environ.get("TOOLCHAIN_THREADS", "1")
    if not re.fullmatch(r"[1-9]\d{0,3}", threads, re.ASCII):
        raise SettingError(f"TOOLCHAIN_THREADS is {threads!r:.40}", "Set it to a number of threads from 1 to 9999")
    if not re.fullmatch(r"[1-9]\d{0,4}", port, re.ASCII) or int(port) > 65535:
        raise SettingError(f"{port!r:.40} is no port", "Pass a number from 1 to 65535 as --port")
    try:
        socket.create_server((host, int(port))).close()
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # negative for an unknown host
        reason = os.strerror(number) if number > 0 else str(error)
        cause = f"The server cannot use port {port} of {host!r:.100}: {reason}"
        raise SettingError(cause, "Pass a free port as --port, or an address of this machine as --host") from error
    return int(port)


def make_models(body: Mapping[str, Any], runner: ModuleType) -> list[TextModel]:
    """Loads all models of a bundle.

    Args:
        body: Content of bundle.json.
        runner: The module classify.py of the bundle.
    """
    pool = ThreadPoolExecutor(1)
    suffix = "_text" if "file" in body["tokenizer_in_graph"] else ""
    models = []
    for model in body["models"]:
        # A model keeps the memory of its largest batch, unless it releases the memory.
        classify = runner.Classifier(FOLDER, model["variant"], release_memory=True)
        models.append(TextModel(PurePosixPath(model["file"]).parts[1] + suffix, classify, pool))
    return models


def main(arguments: Sequence[str]) -> int:
    """Checks settings and bundle, serves its models until a signal ends the server, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="predictor.py", description="Serves the models of this bundle with KServe.")
    parser.add_argument("--host", default="0.0.0.0", help="address that the server listens on; default: all")
    parser.add_argument("--port", default="8080", help="port that the server listens on; default: 8080")
    options = parser.parse_args(arguments)
    verify = load_module("verify")
    try:
        port = check_settings(options.host, options.port)
        body = verify.read_bundle(FOLDER)
        verify.check_runtime(body)
    except SettingError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"The bundle cannot be read: {error}. Copy the whole bundle.", file=sys.stderr)
        return 1
    except verify.BundleError as error:
        print(f"FAILED: {error}.", file=sys.stderr)
        return 3
    models = make_models(body, load_module("classify"))
    for model in models:
        print(f"http://{options.host}:{port}/v2/models/{model.name}/infer", flush=True)
    Server(options.host, port).start(models)
    return 0


if __name__ == "__main__":
    sys.exit(main(_arguments))
