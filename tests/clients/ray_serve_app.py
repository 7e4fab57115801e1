"""Runs serve_app.py of bundles without a Ray cluster, in the environment of the client; prints JSON.

python ray_serve_app.py answer BUNDLE...   for each bundle, the answer to a request for its first model
python ray_serve_app.py start BUNDLE...    for each bundle, the reason why the server does not start
python ray_serve_app.py check BUNDLE       the errors of wrong settings and of a model that returns no number, and
                                           what the server does with requests that arrive together
"""

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starlette.requests import Request

COMMAND, *FOLDERS = sys.argv[1:]
TEXTS = ["a film", "café naïve"]
sys.dont_write_bytecode = True
sys.path.insert(0, FOLDERS[0])
import serve_app  # noqa: E402 (from the bundle)


def post(path, body, root=""):
    """Returns the request that Ray Serve would pass on."""

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({"type": "http", "method": "POST", "path": path, "root_path": root, "headers": []}, receive)


def in_each(function):
    """Returns what a function returns with each bundle."""
    results = []
    for folder in FOLDERS:
        serve_app.FOLDER = Path(folder)
        results.append(function())
    return results


async def answer():
    """Returns status and answer, for an application with the route prefix /texts."""
    server = serve_app.Server()
    await server.check_health()
    name = (await server._answer(Request({"type": "http", "method": "GET", "path": "/v2/models"})))["models"][0]
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}]}
    response = await server(post(f"/texts/v2/models/{name}/infer", body, "/texts"))
    return response.status_code, json.loads(response.body)


def start():
    """Returns the error of a server that does not start."""
    try:
        serve_app.Server()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class Runner:
    """A model that waits until `go` is set, notes its batches, and cannot run the text ``bad``."""

    task, labels = "regression", ["score"]

    def __init__(self):
        self.go, self.batches = threading.Event(), []

    def __call__(self, texts):
        self.go.wait(30)
        self.batches.append(texts)
        if "bad" in texts:
            raise OSError("no answer")
        return [{"score": len(text)} for text in texts]


async def run_together(size, requests, cancelled=()):
    """Sends requests while the model runs another one; returns the answers and the texts of each batch."""
    runner = Runner()
    queue = serve_app.Queue(runner, ThreadPoolExecutor(1))
    queue.max_batch_size = size
    first = asyncio.create_task(queue.classify(["first"]))
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(queue.classify(texts)) for texts in requests]
    await asyncio.sleep(0)
    for index in cancelled:
        tasks[index].cancel()
    runner.go.set()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    last = await queue.classify(["last"])
    shown = [
        type(each).__name__ if isinstance(each, BaseException) else [row["score"] for row in each] for each in answers
    ]
    return {"answers": [*shown, [row["score"] for row in last]], "batches": runner.batches}


async def health():
    """Returns the error of the health check of a server whose model returns no number, and of wrong settings."""
    server = serve_app.Server()
    errors = []
    for settings in ({}, {"max_batch_size": 0}, {"max_batch_size": True}, {"max_batch_size": 8, "other": 1}):
        try:
            server.reconfigure(settings)
        except ValueError as error:
            errors.append(str(error))
    server.reconfigure({"max_batch_size": 8})
    await server.check_health()
    model = next(iter(server._models.values()))
    model.queue = serve_app.Queue(lambda texts: [{"score": float("nan")}], ThreadPoolExecutor(1))
    try:
        await server.check_health()
    except RuntimeError as error:
        errors.append(str(error))
    return errors


async def batches():
    """Returns what happens to requests that arrive while the model is busy."""
    return {
        "merged": await run_together(4, [["a"], ["bb", "ccc"], ["dddd", "e"], ["f"]]),
        "alone": await run_together(1, [["a"], ["bb", "ccc"], ["d"]]),
        "error": await run_together(2, [["a"], ["bad"], ["b"]]),
        "cancelled": await run_together(4, [["a"], ["b"], ["c"]], cancelled=[1]),
    }


async def check():
    """Returns the errors of `health`, and the outcomes of `batches`."""
    return await health(), await batches()


commands = {
    "answer": lambda: in_each(lambda: asyncio.run(answer())),
    "start": lambda: in_each(start),
    "check": lambda: asyncio.run(check()),
}
print(json.dumps(commands[COMMAND]()))
