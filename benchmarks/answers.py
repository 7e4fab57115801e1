"""Asks the clients of all targets the same validation sentences, and counts the answers that differ from Python's.

    make test-clients
    python benchmarks/answers.py

Each client runs the bundle for its target as it is. Node, the browser and the servers get texts, and the runner of the
bundle classifies texts in the Pythons. OpenVINO, the C program and onnxruntime-web on WebGPU get the token ids of the
texts. qemu emulates the other processors, and SwiftShader the graphics processor. The script writes
benchmarks/studies/answers-reference.json.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from clients import CACHE, PYTHON, ROOT, SCRIPTS, run_page, run_process

from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order
from toolchain.ship.targets import clients
from toolchain.system import hardware

sys.path.insert(0, str(ROOT / "tests"))
import emulated
import servers
from c_program import compile_program
from chromium import WEBGPU_FLAGS, Chromium
from demo_page import serve

STUDY = ROOT / "benchmarks" / "studies" / "answers-reference.json"
INSTALLED = CACHE / "test-clients"
INT8, FP32, WEBGPU, OTHER = "onnx-int8", "onnx-fp32", "onnx-webgpu", "onnx-std-int8"
PAGE = "<!doctype html><title>page</title><link rel=icon href='data:,'>"
MLFLOW_CODE = """
import json, sys
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pandas.DataFrame({"text": json.load(open(sys.argv[2]))})
print(json.dumps({"answers": list(model.predict(table)["label"])}))
"""
GROUP = 10  # sentences of a batch on WebGPU
CALL = 3  # batches of a call of the browser, which must answer within minutes


@dataclass
class Study:
    """The bundles of one model, and the sentences.

    Attributes:
        workspace: The workspace of the model.
        folder: Folder of the bundles and of all other files of the study.
        texts: The sentences.
    """

    workspace: Workspace
    folder: Path
    texts: list[str]

    def bundle(self, target: str, *names: str) -> Path:
        """Returns the bundle of the variants for the target; ships it at the first call."""
        folder = self.folder / "-".join([target, *names])
        if not folder.exists():
            shipping.ship(self.workspace, Order(names, target), folder, say, no_bar)
        return folder

    def file(self, name: str, content: Any) -> Path:
        """Writes a file of JSON, and returns its path."""
        (self.folder / name).write_text(json.dumps(content))
        return self.folder / name

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the label names of the model."""
        root = self.workspace.load("torch-fp32")
        assert root is not None
        return root.manifest.labels

    def encode(self) -> list[list[int]]:
        """Returns the token ids of the sentences."""
        artifact = self.workspace.load(FP32)
        assert artifact is not None
        encoder = Encoder.open(artifact.path, ["input_ids", "attention_mask"], artifact.manifest.max_length)
        return [list(ids) for ids in encoder.encode(self.texts)]

    def name_labels(self, logits: list[list[float]]) -> list[str]:
        """Returns the label of the largest logit of each row."""
        return [self.labels[max(range(len(row)), key=row.__getitem__)] for row in logits]


def ask_python(study: Study, variant: str) -> list[str]:
    """Returns the answers of the runner in the bundle for Python."""
    return ask_runner(study, variant, [str(PYTHON)])


def ask_runner(study: Study, variant: str, python: list[str]) -> list[str]:
    """Returns the answers of the runner in the bundle for Python, started with `python`."""
    bundle, texts = study.bundle("python", INT8, FP32, OTHER), study.file("texts.json", study.texts)
    return list(run_process(*python, SCRIPTS / "bare.py", bundle, variant, texts)["answers"])


def ask_node(study: Study, variant: str) -> list[str]:
    """Returns the answers of transformers.js in Node."""
    modules = clients.find_modules(CACHE)
    assert modules is not None
    if not (link := study.folder / "node_modules").exists():
        link.symlink_to(modules)
        shutil.copy(SCRIPTS / "transformers.mjs", study.folder)
    dtype = {INT8: "q8", FP32: "fp32"}[variant]
    bundle, texts = study.bundle("web", INT8, FP32), study.file("texts.json", study.texts)
    return list(run_process("node", study.folder / "transformers.mjs", bundle, dtype, texts)["answers"])


def ask_browser(study: Study, variant: str, threads: int) -> list[str]:
    """Returns the answers of transformers.js in Chromium, on WebAssembly with this number of threads."""
    dtype, bundle = {INT8: "q8", FP32: "fp32"}[variant], study.bundle("web", INT8, FP32)
    output = run_page(bundle, dtype, json.dumps(study.texts), threads)
    if output["isolated"] != (threads > 1):
        raise click.ClickException("The page is isolated without threads, or has threads without isolation.")
    return list(output["answers"])


def ask_webgpu(study: Study, variant: str) -> list[str]:
    """Returns the answers of onnxruntime-web on WebGPU, in Chromium with SwiftShader."""
    modules = clients.find_modules(CACHE)
    assert modules is not None
    artifact = study.workspace.load(variant)
    assert artifact is not None
    encoder = Encoder.open(artifact.path, ["input_ids", "attention_mask"], artifact.manifest.max_length)
    rows = encoder.encode(study.texts)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    feeds = []
    for group in groups:
        arrays = pad([rows[index] for index in group], encoder.names, encoder.pad_id)
        feeds.append({n: ["int64", a.ravel().tolist(), list(a.shape)] for n, a in arrays.items()})
    folder = study.folder / "webgpu"
    folder.mkdir()
    (folder / "onnxruntime-web").symlink_to(modules / "onnxruntime-web")
    (folder / "model.onnx").symlink_to(artifact.onnx_path)
    (folder / "page.html").write_text(PAGE)
    script = (SCRIPTS / "webgpu.js").read_text()
    with serve(folder) as address, Chromium(study.folder / "profile", WEBGPU_FLAGS) as browser:
        browser.open(f"{address}page.html")
        outputs: list[list[float]] = []
        for start in range(0, len(feeds), CALL):
            part = json.dumps(feeds[start : start + CALL])
            outputs += browser.run(f'({script})(["/model.onnx"], {part}, {{}})')[0]["outputs"]
    answers = [""] * len(rows)
    for group, output in zip(groups, outputs, strict=True):
        width = len(output) // len(group)
        named = study.name_labels([output[start : start + width] for start in range(0, len(output), width)])
        for index, label in zip(group, named, strict=True):
            answers[index] = label
    return answers


def ask_openvino(study: Study, variant: str) -> list[str]:
    """Returns the answers of OpenVINO."""
    bundle = study.bundle("other", variant)
    model = next(bundle.rglob("*.onnx"))
    tokens = study.file("tokens.json", study.encode())
    output = run_process(INSTALLED / "openvino" / "bin" / "python", SCRIPTS / "openvino_runtime.py", model, tokens)
    return study.name_labels(output["answers"])


def ask_c(study: Study, variant: str) -> list[str]:
    """Returns the answers of the C program in the README of the bundle for other runtimes."""
    bundle, folder = study.bundle("other", variant), study.folder / "c"
    folder.mkdir()
    program = compile_program(bundle, folder, INSTALLED)
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    commands = ([program, *map(str, ids)] for ids in study.encode())
    outputs = (subprocess.check_output(each, cwd=bundle, env=environment, text=True) for each in commands)
    return [output.strip() for output in outputs]


def ask_triton(study: Study, variant: str) -> list[str]:
    """Returns the answers of Triton, with a Python backend in the place of its ONNX Runtime backend."""
    return _ask_server(study, variant, servers.triton, study.bundle("server", INT8, FP32) / "repository")


def ask_kserve(study: Study, variant: str) -> list[str]:
    """Returns the answers of the bundle's server for KServe."""
    return _ask_server(study, variant, servers.kserve, study.bundle("server", INT8, FP32))


def _ask_server(study: Study, variant: str, start: Callable[..., Any], path: Path) -> list[str]:
    """Starts a server, and asks it by the Open Inference Protocol."""
    answers = []
    with tempfile.TemporaryDirectory(dir=study.folder) as scratch, start(path, Path(scratch)) as port:
        for text in study.texts:  # alone, because the other texts of a batch affect the scales of int8
            status, answer = servers.call(port, f"models/{variant}_text/infer", servers.request(text))
            if status != 200:
                raise click.ClickException(f"The server answers {status}: {answer}")
            answers += study.name_labels(servers.read_rows(answer, "probabilities"))
    return answers


def ask_mlflow(study: Study, variant: str) -> list[str]:
    """Returns the answers of MLflow."""
    python, texts = INSTALLED / "mlflow" / "bin" / "python", study.file("texts.json", study.texts)
    return list(run_process(python, "-c", MLFLOW_CODE, study.bundle("mlflow", variant), texts)["answers"])


CLIENTS: dict[str, tuple[str, Callable[[Study, str], list[str]]]] = {
    "Python": (INT8, ask_python),
    "Python, AVX2 without VNNI (emulated)": (
        INT8,
        functools.partial(ask_runner, python=emulated.python(emulated.AVX2, INSTALLED)),
    ),
    "Python, 64-bit ARM (emulated)": (
        INT8,
        functools.partial(ask_runner, python=emulated.python(emulated.ARM, INSTALLED)),
    ),
    "Node": (INT8, ask_node),
    "browser, WebAssembly, 1 thread": (INT8, functools.partial(ask_browser, threads=1)),
    "browser, WebAssembly, 2 threads": (INT8, functools.partial(ask_browser, threads=2)),
    "browser, WebGPU (SwiftShader)": (WEBGPU, ask_webgpu),
    "Triton (Python backend)": (INT8, ask_triton),
    "KServe": (INT8, ask_kserve),
    "MLflow": (INT8, ask_mlflow),
    "OpenVINO": (OTHER, ask_openvino),
    "C": (OTHER, ask_c),
}
# Each answer is compared with that of the same variant in Python, or of a variant with the same weights and precision.
COMPARED_WITH = {INT8: INT8, WEBGPU: FP32, OTHER: OTHER}


@click.command()
@click.option("--sentences", default=300, show_default=True, help="Number of validation sentences.")
@click.option(
    "--client",
    "chosen",
    multiple=True,
    type=click.Choice(list(CLIENTS)),
    help="Ask only this client, and keep other rows.",
)
@click.option("--exported", type=click.Path(path_type=Path), default=ROOT / "exported", show_default=True)
def main(sentences: int, chosen: tuple[str, ...], exported: Path) -> None:
    """Ships the bundles, asks every client, saves the results and prints them."""
    workspace = Workspace.open("reference", exported)
    with tempfile.TemporaryDirectory() as scratch, bar("clients") as progress:
        study = Study(workspace, Path(scratch), list(inputs.load_embedded().texts[:sentences]))
        expected = {variant: ask_python(study, variant) for variant in (INT8, FP32, OTHER)}
        rows = json.loads(STUDY.read_text())["rows"] if chosen else {}
        for done, (client, (variant, ask)) in enumerate(CLIENTS.items()):
            if chosen and client not in chosen:
                continue
            progress(done, len(CLIENTS), client)
            pairs = zip(ask(study, variant), expected[COMPARED_WITH[variant]], strict=True)
            rows[client] = {"variant": variant, "sentences": sentences, "flips": sum(a != b for a, b in pairs)}
    body = {"schema": 1, "machine": hardware.machine(), "packages": packages(), "rows": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def packages() -> dict[str, str]:
    """Returns the releases of the clients."""
    return {name: clients.version(name) for name in (clients.TRANSFORMERS, clients.RUNTIME, "onnxruntime-node")}


def summary(body: dict[str, Any]) -> list[str]:
    """Returns a text table of the results, as a list of lines."""
    lines = [f"{'':38} {'variant':16} {'sentences':>9} {'flips':>6}"]
    lines += [
        f"{client:38} {row['variant']:16} {row['sentences']:9} {row['flips']:6}" for client, row in body["rows"].items()
    ]
    return lines


if __name__ == "__main__":
    main()
