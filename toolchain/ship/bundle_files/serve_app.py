"""Serves the models of this bundle with Ray Serve: serve run serve.yaml

Each replica answers the Open Inference Protocol v2 over HTTP. It serves each model of the bundle under the name of its
variant. A request has one input, ``text``: 1 to `MAX_TEXTS` texts, BYTES [texts, 1] or [texts]. The answer has
``label`` and ``probabilities``; without ``label`` if a text can have several labels, and only ``logits`` for a
regression model, whose logits are the scores.

A replica first checks that its copy of the bundle is unmodified; otherwise it does not start. It runs one batch at a
time. Requests that arrive in the meantime form the next batch; ``max_batch_size`` in serve.yaml limits its texts. The
replica uses one thread for each CPU that ``num_cpus`` in serve.yaml gives it. The environment variable
TOOLCHAIN_THREADS sets another number of threads.
"""

import asyncio
import importlib.util
import json
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

FOLDER = Path(__file__).resolve().parent  # the bundle
MAX_TEXTS = 32  # of one request
MAX_CHARACTERS = 1 << 16  # of one text
MAX_BODY_BYTES = 1 << 20
BINARY_HEADER = "inference-header-content-length"
EXAMPLE = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a charming film"]}]}'
_HINT = f"Send the texts as in this example: {EXAMPLE}"


class RequestError(Exception):
    """A request is wrong; the exception has the status and the sentences of the answer."""

    def __init__(self, status: int, cause: str, hint: str) -> None:
        super().__init__(f"{cause}. {hint}.")
        self.status = status


class Queue:
    """Runs one model, and merges the requests that wait for it into batches.

    Args:
        classify: Runner of the model, from classify.py of the bundle.
        pool: Thread that runs the models, so that the replica can answer other addresses in the meantime.
    """

    def __init__(self, classify: Any, pool: ThreadPoolExecutor) -> None:
        self.max_batch_size = MAX_TEXTS
        self._classify, self._pool = classify, pool
        self._waiting: deque[tuple[list[str], asyncio.Future[list[dict[str, float]]]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def classify(self, texts: list[str]) -> list[dict[str, float]]:
        """Returns the scores of the texts of one request; they run in one batch, maybe with other requests."""
        future: asyncio.Future[list[dict[str, float]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_batches())
        return await future

    async def run(self, texts: list[str]) -> list[dict[str, float]]:
        """Returns the scores of one batch; the thread runs it after the current batch, before waiting requests."""
        scores: list[dict[str, float]] = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._classify, texts
        )
        return scores

    async def _run_batches(self) -> None:
        while requests := self._next_batch():
            try:
                scores = await self.run([text for texts, _ in requests for text in texts])
            except Exception as error:  # every request of the batch gets the error, whatever it is
                for _, future in requests:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for texts, future in requests:
                if not future.done():
                    future.set_result(scores[start : start + len(texts)])
                start += len(texts)

    def _next_batch(self) -> list[tuple[list[str], "asyncio.Future[list[dict[str, float]]]"]]:
        """Removes the requests of the next batch from the queue: the first one, and others until the batch is full."""
        requests: list[tuple[list[str], asyncio.Future[list[dict[str, float]]]]] = []
        size = 0
        while self._waiting and (not requests or size + len(self._waiting[0][0]) <= self.max_batch_size):
            texts, future = self._waiting.popleft()
            if not future.done():  # a client that closed its connection cancelled its request
                requests.append((texts, future))
                size += len(texts)
        return requests


class Model:
    """One model of the bundle: reads its requests, and writes its answers.

    Args:
        name: Name of the model on the server.
        classify: Runner of the model, from classify.py of the bundle.
        pool: Thread that runs the models.
    """

    def __init__(self, name: str, classify: Any, pool: ThreadPoolExecutor) -> None:
        self.name = name
        self.queue = Queue(classify, pool)
        scores = "logits" if classify.task == "regression" else "probabilities"
        self._outputs = {scores: ("FP32", len(classify.labels))}
        if classify.task == "single_label_classification":
            self._outputs = {"label": ("BYTES", 1), **self._outputs}

    def metadata(self) -> dict[str, Any]:
        """Returns the description of the model, in the form of the protocol."""
        return {
            "name": self.name,
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": [-1, width]}
                for name, (datatype, width) in self._outputs.items()
            ],
        }

    async def infer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request; with all outputs if the request names none.

        Raises:
            RequestError: The request is wrong.
        """
        texts, names = read_texts(body), read_names(body)
        if unknown := [name for name in names if name not in self._outputs]:
            known = " and ".join(self._outputs)
            raise RequestError(400, f"The model {self.name} has no output {unknown[0]!r:.100}", f"Request {known}")
        request_id = body.get("id")
        if not isinstance(request_id, str | None):
            raise RequestError(400, "The id is not text", _HINT)
        scores = await self.queue.classify(texts)
        columns: dict[str, list[Any]] = {
            "label": [max(row, key=row.__getitem__) for row in scores],
            "probabilities": [value for row in scores for value in row.values()],
        }
        columns["logits"] = columns["probabilities"]
        outputs = [
            {"name": name, "datatype": datatype, "shape": [len(texts), width], "data": columns[name]}
            for name, (datatype, width) in self._outputs.items()
            if not names or name in names
        ]
        return {
            "model_name": self.name,
            "model_version": "1",
            **({} if request_id is None else {"id": request_id}),
            "outputs": outputs,
        }


def read_texts(body: Mapping[str, Any]) -> list[str]:
    """Returns the texts of a request.

    Raises:
        RequestError: The request does not have one input ``text``, or it has another type, shape, number, length or
            kind of texts than `EXAMPLE` shows.
    """

    def require(condition: bool, cause: str) -> None:
        if not condition:
            raise RequestError(400, cause, _HINT)

    tensors: list[Any] = body["inputs"] if isinstance(body.get("inputs"), list) else [None]
    require(all(isinstance(each, dict) for each in tensors), "The body has no inputs")
    names = [tensor.get("name") for tensor in tensors]
    require(names == ["text"], f"The request has the inputs {names!r:.100} instead of one input 'text'")
    datatype, shape, data = (tensors[0].get(key) for key in ("datatype", "shape", "data"))
    require(datatype == "BYTES", f"The input has the datatype {datatype!r:.40} instead of 'BYTES'")
    require(isinstance(data, list), "The data is not a list")
    texts = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in data]
    count = len(texts)
    require(0 < count <= MAX_TEXTS, f"The request has {count} texts instead of 1 to {MAX_TEXTS}")
    require(shape in ([count, 1], [count]), f"The input has the shape {shape!r:.100}, but its data has {[count, 1]}")
    require(all(isinstance(text, str) for text in texts), "The data has a value that is not text")
    longest = max(map(len, texts))
    require(longest <= MAX_CHARACTERS, f"A text has {longest} characters instead of at most {MAX_CHARACTERS}")
    # JSON can state half of a surrogate pair, which is not a character.
    is_text = all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts)
    require(is_text, "A text has half of a surrogate pair")
    return texts


def read_names(body: Mapping[str, Any]) -> list[Any]:
    """Returns the names of the outputs that a request chooses; an empty list if it chooses none."""
    outputs = body.get("outputs") or []
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
        raise RequestError(400, "The outputs are not a list of objects", _HINT)
    return [output.get("name") for output in outputs]


async def read_body(request: Request) -> dict[str, Any]:
    """Returns the JSON of a request.

    Raises:
        RequestError: The body is too large, or not a JSON object; or the request has binary tensors.
    """
    if BINARY_HEADER in request.headers:
        raise RequestError(400, "This server reads no binary tensors", _HINT)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise RequestError(413, f"The request has more than {MAX_BODY_BYTES} bytes", "Send fewer or shorter texts")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error!s:.100}", _HINT) from error
    if not isinstance(body, dict):
        raise RequestError(400, "The body is not a JSON object", _HINT)
    return body


def load_module(name: str) -> ModuleType:
    """Imports a script of the bundle, whatever other modules have its name."""
    spec = importlib.util.spec_from_file_location(f"bundle_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_threads() -> None:
    """Sets TOOLCHAIN_THREADS, from which classify.py reads the number of threads, unless the user set it.

    Raises:
        ValueError: The user set a value that is not a number of threads.
    """
    if "TOOLCHAIN_THREADS" not in os.environ:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        os.environ["TOOLCHAIN_THREADS"] = str(max(1, int(cpus)))
    threads = os.environ["TOOLCHAIN_THREADS"]
    if not re.fullmatch(r"[1-9]\d{0,3}", threads, re.ASCII):
        raise ValueError(f"TOOLCHAIN_THREADS is {threads!r:.40}. Set it to a number of threads from 1 to 9999.")


class Server:
    """One replica: checks the bundle, loads its models and answers requests.

    Raises:
        Exception: A setting is wrong, or the bundle was modified; the replica does not start.
    """

    def __init__(self) -> None:
        set_threads()
        verify = load_module("verify")
        body = verify.read_bundle(FOLDER)  # before classify.py runs
        verify.check_runtime(body)
        runner = load_module("classify")
        pool = ThreadPoolExecutor(1)
        self._models: dict[str, Model] = {}
        for entry in body["models"]:
            # A model keeps the memory of its largest batch, unless it releases the memory.
            classify = runner.Classifier(FOLDER, entry["variant"], release_memory=True)
            self._models[entry["variant"]] = Model(entry["variant"], classify, pool)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Takes the settings of serve.yaml; Ray Serve calls this method at the start and after `serve deploy`.

        Args:
            user_config: The entry ``user_config`` of serve.yaml. Its entry ``max_batch_size`` is the largest number of
                texts in a batch of several requests; with 1, each request is its own batch.

        Raises:
            ValueError: A setting is unknown or wrong.
        """
        size = user_config.get("max_batch_size")
        if set(user_config) != {"max_batch_size"} or type(size) is not int or not 1 <= size <= 1024:
            raise ValueError(f"user_config is {dict(user_config)!r:.100}. Set only max_batch_size, from 1 to 1024.")
        for model in self._models.values():
            model.queue.max_batch_size = size

    async def check_health(self) -> None:
        """Runs a text in each model; Ray Serve replaces a replica whose check raises an error or ends too late."""
        for model in self._models.values():
            scores = await model.queue.run(["a film"])
            if not all(math.isfinite(value) for row in scores for value in row.values()):
                raise RuntimeError(f"The model {model.name} returns a score that is not a number.")

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers one HTTP request."""
        try:
            return JSONResponse(await self._answer(request))
        except RequestError as error:
            return JSONResponse({"error": str(error)}, error.status)

    async def _answer(self, request: Request) -> dict[str, Any]:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        match request.method, path.split("/")[1:]:
            case "GET", ["v2"]:
                return {"name": "ray-serve", "version": ray.__version__, "extensions": []}
            case "GET", ["v2", "health", "live"]:
                return {"live": True}
            case "GET", ["v2", "health", "ready"]:
                return {"ready": True}
            case "GET", ["v2", "models"]:
                return {"models": list(self._models)}
            case "GET", ["v2", "models", name]:
                return self._model(name).metadata()
            case "GET", ["v2", "models", name, "ready"]:
                return {"name": self._model(name).name, "ready": True}
            case "POST", ["v2", "models", name, "infer"]:
                return await self._model(name).infer(await read_body(request))
        # A terminal that shows the answer would obey control characters.
        cause = f"This server has no {request.method:.10} {path[:100]!r}"
        raise RequestError(404, cause, "Send the request to POST /v2/models/NAME/infer")

    def _model(self, name: str) -> Model:
        if name not in self._models:
            known = " or ".join(self._models)
            raise RequestError(404, f"This server has no model {name[:100]!r}", f"Use {known}")
        return self._models[name]


# `serve.yaml` names this application. Ray imports the class by its name, so a replica loads its own copy of the bundle.
app = serve.deployment()(Server).bind()
