"""Tests of the apps in examples/: each app answers ten validation sentences like its model does in Python.

A test copies an app to an empty folder, and runs the command `toolchain ship` of the app's README.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import onnxruntime_extensions
import pytest
from c_program import compile_source, reason_to_skip
from chromium import EXTENSION_FLAGS, Chromium
from conftest import MODULES, NODE, ROOT, needs_node
from demo_page import needs_chromium, serve, use_npm_packages
from servers import KSERVE, call_path, free_port, server_process, wait_until_ready

import toolchain
from toolchain.cli import main
from toolchain.data import inputs
from toolchain.ship.bundle_files.verify import read_bundle
from toolchain.ship.targets import BUNDLE_FILES, clients

EXAMPLES = ROOT / "examples"
APPS = ("page", "browser-extension", "node-service", "fastapi-service", "cpp-cli")
CLIENTS = ROOT / "exported" / ".cache" / "test-clients"
JSON = {"Content-Type": "application/json"}
# The library inside the Python package onnxruntime-extensions needs symbols of libpython.
LIBPYTHON = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("INSTSONAME")

needs_kserve = pytest.mark.skipif(not KSERVE.exists(), reason="needs `make test-clients`")
needs_compiler = pytest.mark.skipif(bool(reason := reason_to_skip(CLIENTS)), reason=reason)
needs_libpython = pytest.mark.skipif(
    ".so" not in LIBPYTHON.name or not LIBPYTHON.exists(), reason="this Python has no shared libpython"
)


def read_readme(app):
    return (EXAMPLES / app / "README.md").read_text()


@pytest.fixture(scope="module")
def install(reference, tmp_path_factory):
    """Returns a function that copies an app, writes its bundle into the copy, and returns the copy's folder."""
    root = tmp_path_factory.mktemp("apps")
    if MODULES:  # Node searches for packages in the folder of a file and in all parent folders
        (root / "node_modules").symlink_to(MODULES)
        use_npm_packages(reference.exported)

    @functools.cache
    def ship(*arguments):
        bundle = tmp_path_factory.mktemp("bundle") / "bundle"
        assert main([*arguments, "--output", str(bundle), "--exported", str(reference.exported)]) == 0
        return bundle

    @functools.cache
    def install_app(app):
        (command,) = re.findall(r"^toolchain (ship .*)$", read_readme(app), re.MULTILINE)
        *arguments, option, output = command.split()
        assert (option, output) == ("--output", f"examples/{app}/bundle")
        ignored = shutil.ignore_patterns("bundle", "vendor", "node_modules", ".venv")
        shutil.copytree(EXAMPLES / app, root / app, ignore=ignored)
        shutil.copytree(ship(*arguments), root / app / "bundle")
        return root / app

    return install_app


@pytest.fixture(scope="module")
def expected(reference):
    """Ten validation sentences, and the label that the model of the apps gives each of them in Python."""
    with toolchain.Classifier(reference.path("onnx-int8"), threads=1) as classify:
        labels = {text: classify(text).label for text in inputs.load_embedded().sample(10, 7)}
    assert len(labels) == 10
    assert set(labels.values()) == {"NEGATIVE", "POSITIVE"}
    return labels


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this folder is no git clone")
def test_the_overview_and_git_know_every_app():
    overview = (EXAMPLES / "README.md").read_text()
    assert {path.parent.name for path in EXAMPLES.glob("*/README.md")} == set(APPS)
    for app in APPS:
        assert f"[`{app}/`]({app}/README.md)" in overview
    bundles = [f"examples/{app}/bundle/model.onnx" for app in APPS]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *bundles], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ignored.stdout.split() == bundles, ignored.stderr


ANSWER = """(async text => {
    const [review, submit, answer] = ["review", "submit", "answer"].map(id => document.getElementById(id));
    const wait = async () => { while (submit.disabled) await new Promise(done => setTimeout(done, 20)) };
    await wait();
    review.value = text;
    submit.click();
    await wait();
    return answer.value;
})"""


FIRST_ANSWER = """(async answer => {
    while (answer.value.startsWith("Loading")) await new Promise(done => setTimeout(done, 20));
    return answer.value;
})"""


@pytest.mark.slow
@pytest.mark.web
@needs_chromium
def test_the_page_gives_the_labels(install, expected, tmp_path):
    with serve(install("page")) as address, Chromium(tmp_path / "profile") as browser:
        browser.open(address)
        for text, label in expected.items():
            answer = browser.run(f"{ANSWER}({json.dumps(text)})")
            assert re.fullmatch(rf"{label} \(\d+\.\d %\)", answer), answer
        assert browser.complaints(address) == []


@pytest.mark.slow
@pytest.mark.web
@needs_chromium
def test_the_page_shows_why_it_has_no_model(install, tmp_path):
    shutil.copytree(install("page"), tmp_path / "page")
    (tmp_path / "page" / "bundle" / "onnx" / "model_quantized.onnx").unlink()
    with serve(tmp_path / "page") as address, Chromium(tmp_path / "profile") as browser:
        browser.open(address)
        assert browser.run(f"{FIRST_ANSWER}(document.getElementById('answer'))").startswith("Error: ")


# Sends the event that a click on the menu entry sends, and waits until the icon's tooltip shows the answer.
CLICK = """(async text => {
    const pause = () => new Promise(done => setTimeout(done, 20));
    const hasEntry = () => chrome.contextMenus.update("classify", {}).then(() => true, () => false);
    while (!await hasEntry()) await pause();
    chrome.contextMenus.onClicked.dispatch({menuItemId: "classify", selectionText: text}, {id: 1});
    let title;
    do {
        await pause();
        title = await chrome.action.getTitle({});
    } while (!title.endsWith(text) && !title.startsWith("Error"));
    return [title, await chrome.action.getBadgeText({})];
})"""


@pytest.fixture
def extension(install):
    """The folder of the extension, with the copy of transformers.js that its README writes."""
    folder = install("browser-extension")
    subprocess.run([NODE, folder / "prepare.mjs"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.web
@needs_node
@needs_chromium
def test_the_extension_gives_the_labels(extension, expected, tmp_path):
    with Chromium(tmp_path / "profile", EXTENSION_FLAGS) as browser:
        browser.load_extension(extension, "background.js")
        for text, label in expected.items():
            title, badge = browser.run(f"{CLICK}({json.dumps(text)})")
            assert re.fullmatch(rf"{label} \(\d+\.\d %\): {re.escape(text)}", title), title
            assert badge == label[:4]


@pytest.mark.slow
@pytest.mark.web
@needs_node
@needs_chromium
def test_the_extension_shows_why_it_has_no_model(extension, tmp_path):
    shutil.copytree(extension, tmp_path / "extension")
    (tmp_path / "extension" / "bundle" / "onnx" / "model_quantized.onnx").unlink()
    with Chromium(tmp_path / "profile", EXTENSION_FLAGS) as browser:
        browser.load_extension(tmp_path / "extension", "background.js")
        title, badge = browser.run(f"{CLICK}('a charming film')")
    assert title.startswith("Error: ")
    assert badge == "!"


@needs_node
def test_prepare_refuses_another_transformers_js(tmp_path):
    shutil.copy(EXAMPLES / "browser-extension" / "prepare.mjs", tmp_path)
    (tmp_path / "bundle" / "demo").mkdir(parents=True)
    (tmp_path / "bundle" / "demo" / "transformers.min.js").write_text('import {Tensor} from "onnxruntime-common";')
    ended = subprocess.run([NODE, tmp_path / "prepare.mjs"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "imports ONNX Runtime in 1 places instead of 2" in ended.stderr
    assert not (tmp_path / "vendor").exists()


@contextmanager
def service(command, folder, log, **variables):
    """Starts the service of an app, and yields a function that sends it a text or the bytes of a body."""
    port = free_port()
    environment = {**os.environ, "TOOLCHAIN_THREADS": "1", **variables, "PORT": str(port)}
    command = [part.replace("PORT", str(port)) for part in map(str, command)]
    with server_process(command, log, environment, folder) as (process, output):
        wait_until_ready(port, process, output, "/health")

        def ask(body, path="/classify"):
            return call_path(port, path, body if isinstance(body, bytes) else {"text": body}, JSON)

        yield ask


def require_labels(ask, expected):
    for text, label in expected.items():
        status, answer = ask(text)
        assert (status, answer["label"]) == (200, label)
        assert 0.5 < answer["score"] <= 1


@pytest.mark.slow
@needs_node
def test_the_service_in_node_gives_the_labels(install, expected, tmp_path):
    with service([NODE, "server.mjs"], install("node-service"), tmp_path / "log.txt") as ask:
        require_labels(ask, expected)
        assert ask(b"{")[0] == ask(b"null")[0] == ask(b'{"text": 1}')[0] == ask("")[0] == 400
        assert ask("a film", "/other")[0] == 404
        assert ask("long " * 100_000) == (413, {"error": "The body has more than 100000 bytes."})
        assert ask("word " * 1_000)[0] == 200  # more tokens than the model reads


def test_the_service_in_node_names_the_tested_packages():
    ours, tested = (
        json.loads((folder / "package.json").read_text()) for folder in (EXAMPLES / "node-service", clients.PACKAGES)
    )
    assert ours["dependencies"] == tested["dependencies"]
    assert ours["overrides"] == tested["overrides"]


def read_dockerfile():
    """Returns (word, rest) of each instruction in the Dockerfile of the service in Python."""
    lines = (EXAMPLES / "fastapi-service" / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


@pytest.mark.slow
@needs_kserve
def test_the_service_in_python_gives_the_labels(install, expected, tmp_path):
    """Runs the service in a folder with the files of the image, by the command of the image."""
    instructions = read_dockerfile()
    app, image = install("fastapi-service"), tmp_path / "image"
    image.mkdir()
    for *sources, target in (rest.split() for word, rest in instructions if word == "COPY"):
        for source in (each for each in sources if not each.startswith("--")):
            if (app / source).is_dir():
                shutil.copytree(app / source, image / target)
            else:
                shutil.copy(app / source, image / target)
    python, *arguments = json.loads(dict(instructions)["CMD"])
    assert (python, arguments[-4:]) == ("python", ["--host", "0.0.0.0", "--port", "8000"])
    command = [KSERVE, *arguments[:-4], "--host", "127.0.0.1", "--port", "PORT"]
    with service(command, image, tmp_path / "log.txt") as ask:
        require_labels(ask, expected)
        assert ask(b"{")[0] == ask(b'{"text": 1}')[0] == ask("")[0] == ask("long " * 10_000)[0] == 422
        assert ask("word " * 1_000)[0] == 200  # more tokens than the model reads
    files = {path.relative_to(image / "bundle").as_posix() for path in (image / "bundle").rglob("*") if path.is_file()}
    assert files == {"bundle.json", *(each["path"] for each in read_bundle(image / "bundle")["files"])}


def test_the_service_in_python_names_the_tested_packages():
    tested = (BUNDLE_FILES / "requirements_kserve.lock").read_text()
    for line in (EXAMPLES / "fastapi-service" / "requirements.txt").read_text().splitlines():
        assert re.search(rf"^{re.escape(line)} ", tested, re.MULTILINE), line


@pytest.mark.slow
@needs_compiler
@needs_libpython
def test_the_program_gives_the_labels(install, expected, tmp_path):
    app = install("cpp-cli")
    program = compile_source(app / "classify.cpp", tmp_path, CLIENTS, "C++")
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "LD_PRELOAD": str(LIBPYTHON)}

    def run(*arguments):
        return subprocess.run(
            [program, *arguments],
            input="\n".join(expected),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    library = onnxruntime_extensions.get_library_path()
    ended = run(app / "bundle" / "model.onnx", library)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert {text: label for label, _, text in rows} == expected
    assert all(0.5 < float(probability) <= 1 for _, probability, _ in rows)
    assert run().returncode == 2
    missing_model = run(app / "model.onnx", library)
    assert missing_model.returncode == 1
    assert "model.onnx" in missing_model.stderr
