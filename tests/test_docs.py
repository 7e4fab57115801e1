"""Tests of README and docs/: their commands and code run, generated parts are current, and links work."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from chromium import PROGRAM, Chromium
from command_server import CommandServer
from conftest import ROOT, make_checkpoint
from readme_parts import BENCH, MARKED, PAGES, filled, parts
from test_imports import FLOORS

import toolchain

README = ROOT / "README.md"
GPU = "needs a GPU and the packages for GPUs"
RAY = "needs a Ray cluster; tests/distributed/ starts one"
SAME = "`make ship` builds a bundle for the same target"
CHAIN = "needs a certificate; tests/ship/test_signing.py makes one"
PRUNED = "needs a model that trains for minutes; tests/build/test_exits_step.py builds a small one"
MINUTES = "takes minutes; tests/tuning/ tests the search"
HUB = "needs the model hub; tests/ship/test_pushing.py uses a stand-in"
# Maps a command on a page to the reason why no test in this file runs it.
NOT_RUN = {
    "make install RUNTIME=gpu": GPU,
    "make install TORCH_INDEX=https://download.pytorch.org/whl/cpu": "needs the network",
    'pip install -c constraints/cpu.txt -e ".[cpu,bnb]"': "installs into the environment of the tests",
    "make install SET=optimum": "installs into the environment of the tests",
    ".venv/bin/toolchain bench --provider cuda --save-as reference-t4": GPU,
    'pip install -c constraints/cpu.txt -e ".[cpu,bnb,ray]"    # on every machine': RAY,
    "ray start --head                                          # on one machine; it prints ADDR": RAY,
    "ray start --address ADDR                                  # on the others": RAY,
    "toolchain predict onnx-int8 reviews.csv --output scored.parquet --engine ray --address auto": RAY,
    "toolchain predict onnx-int8 s3://bucket/reviews/ --output s3://bucket/scored/ --engine ray --address auto": RAY,
    "toolchain bench --quick --engine ray --address auto": RAY,
    "toolchain compare new.json --against old.json --max-regression 5%": "tests/compare/test_limits.py runs it",
    "toolchain prune --max-drop 1.0": "takes minutes; tests/pruning/ tests the search",
    "toolchain quantize --sensitivity": "tests/quantization/ tests it",
    "toolchain ship onnx-int8 --target python --output app-model --sign author.pem --certificate author.crt": CHAIN,
    "toolchain verify app-model --root-certificate root.crt": CHAIN,
    "toolchain ship --output app-model --push USER/NAME": HUB,
    "hf download USER/NAME --local-dir app-model-download": HUB,
    "toolchain verify app-model-download": HUB,
    "toolchain ship onnx-int8 --target web": SAME,
    "toolchain ship onnx-int8 --target python": SAME,
    "toolchain ship onnx-int8 --target mlflow": SAME,
    "toolchain ship onnx-int8 --target ray-serve": "tests/ship/test_ray_serve.py ships the same",
    "toolchain ship onnx-std onnx-std-int8 --target other": SAME,
    "toolchain ship onnx-int8 --target python --output app-tuned --session session.json --session-for throughput": (
        "needs a session file; tests/ship/test_session_settings.py makes one"
    ),
    "toolchain quantize --from onnx-pruned73-r4+fast": PRUNED,
    "toolchain quantize --from onnx-pruned73-r4+narrow": PRUNED,
    "toolchain exits --from onnx-pruned73-r4-int8+fast": PRUNED,
    "toolchain tune --session onnx-int8 --output session.json": MINUTES,
    "toolchain tune --max-drop 1.0 --objective latency --budget 20m": MINUTES,
    "toolchain tune --model ./my-checkpoint --train-data train.csv --data validation.csv": MINUTES,
}
# Commands that this file runs only with --dry-run, because other tests build their artifacts.
PLANNED = {
    "toolchain bench --quick",
    "toolchain bench --quick --model ./orders --data tests/orders.jsonl --label-column tags --variant torch-fp32 "
    "--variant onnx-int8",
    "toolchain bench --quick --model ./stars --data tests/reviews.csv --label-column stars --variant torch-fp32 "
    "--variant onnx-int8",
    "toolchain bench --quick --provider cpu --variant torch-fp32 --variant torch-compile --variant onnx-fp32",
    "toolchain bench --quick --provider cpu --variant torch-fp32 --variant onnx-int8",
    "toolchain export --no-pass residual-sum --name plain",
    "toolchain exits",
    "toolchain prune --ratio 0.5 --recover 1",
    "toolchain prune --ratio 0.65 --layers 4 --cost latency --recover 1 --name fast",
    "toolchain prune --ratio 0.73 --cost latency --layers 4 --recover 4 --exits --name fast",
    "toolchain prune --ratio 0.73 --layers 4 --embedding-rank 128 --recover 4 --name narrow",
    "toolchain quantize --backend torch --scheme int8 --from torch-fp32 --from torch-pruned50",
    "toolchain quantize --embeddings int4 --name small",
    "toolchain quantize --from onnx-pruned50-r1",
    "toolchain quantize --keep-fp32 2 --name careful",
    "toolchain quantize --no-pass padding --name padded",
    "toolchain quantize --scheme int4 --trim-vocab train --name tiny",
}
# Pages whose commands this file runs, on a small model in place of the reference model. The pages in docs/reference/
# have no commands.
RUN_PAGES = [page for page in PAGES if "reference" not in page.relative_to(ROOT).parts]
BLOCK = re.compile(r"(<!-- client: .* -->\n)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Returns (language, text) of each code block of a page, except the code for apps, which tests/ship/ runs."""
    return [(kind, text) for client, kind, text in BLOCK.findall(page.read_text()) if not client]


def commands(text):
    return [line for line in text.splitlines() if line and not line.startswith("source ")]


def test_the_generated_parts_of_pages_are_current():
    generated, names = parts(), set()
    for page in PAGES:
        text = page.read_text()
        names |= {match[2] for match in MARKED.finditer(text)}
        assert filled(text, generated) == text, f"{page} is not current: run `make docs`"
        assert text.count("<!-- begin: ") == len(MARKED.findall(text)), (
            f"{page}: a comment `<!-- begin: NAME -->` has no comment `<!-- end: NAME -->` with the same NAME"
        )
    assert names == set(generated)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_links_between_files_have_a_target():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_exempted_command_is_on_a_page():
    page_commands = {
        command for page in RUN_PAGES for kind, text in blocks(page) if kind == "bash" for command in commands(text)
    }
    assert PLANNED | set(NOT_RUN) <= page_commands


def test_the_map_of_the_architecture_names_every_file():
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    for path in Path(toolchain.__file__).parent.rglob("*.py"):
        if path.name == "__init__.py":
            assert f"{path.parent.name}/" in text, f"{path.parent} is not on the map of the architecture"
        elif path.name != "__main__.py":
            assert re.search(rf"\b{re.escape(path.name)}", text), f"{path} is not on the map of the architecture"


def test_the_documented_floors_match_the_tested_ones():
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    rooms_by_floor = {int(floor): set(re.findall(r"`(\w+)(?:\.py)?`", rooms)) for floor, rooms in rows}
    assert rooms_by_floor == {floor: rooms for floor, rooms in enumerate(FLOORS, 1) if "reference" not in rooms}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a new clone, with a tiny checkpoint as its model."""
    marker = Path(sys.prefix) / ".installed"
    # `make install` would reinstall an environment whose marker file `.installed` names no runtime
    if not marker.exists() or not marker.read_text().strip():
        pytest.skip("needs the environment that `make install` creates")
    folder = tmp_path_factory.mktemp("clone")
    for path in (ROOT / "Makefile", ROOT / "setup.cfg", ROOT / "pyproject.toml"):
        shutil.copy2(path, folder)  # `copy2` keeps the modification time, which make compares.
    shutil.copytree(ROOT / "constraints", folder / "constraints")
    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results", ignore=lambda *_: {"local"})
    (folder / "tests").mkdir()
    for name in ("tickets.csv", "reviews.csv", "orders.jsonl"):
        shutil.copy2(ROOT / "tests" / name, folder / "tests")
    make_checkpoint(folder / "my-checkpoint", width=64, leaning=30)
    rows = "".join(f"a film of {i} words,{i % 2}\n" for i in range(30))
    (folder / "reviews.csv").write_text("review,label\n" + rows)
    return folder


@pytest.fixture(scope="module")
def environment():
    variables = {**os.environ, "MAKEFLAGS": "MODEL=./my-checkpoint"}
    # The environment variables below make commands without --model use the tiny model instead of the reference model.
    for command in (
        "EXPORT",
        "PRUNE",
        "QUANTIZE",
        "BENCH",
        "COMPARE",
        "VALIDATE",
        "VARIANTS",
        "PREDICT",
        "SHIP",
        "RECIPE",
        "EXPLAIN",
    ):
        variables[f"TOOLCHAIN_{command}_MODEL"] = "my-checkpoint"
    # A benchmark of all default cells takes minutes, even with a tiny model.
    variables["TOOLCHAIN_BENCH_VARIANT"] = "torch-fp32 onnx-fp32 onnx-int8"
    variables["SHORT_BENCH"] = "1"
    # The demo page of a web bundle needs npm packages; tests/ship/test_clients.py tests this page.
    variables["TOOLCHAIN_SHIP_DEMO"] = "false"
    return variables


@pytest.fixture(scope="module")
def environment_folder(clone, environment):
    """The folder `.venv` of the clone: links to the tests' environment, and a quick program `toolchain`."""
    folder = clone / ".venv"
    (folder / "bin").mkdir(parents=True)
    for path in Path(sys.prefix).iterdir():
        if path.name != "bin":
            (folder / path.name).symlink_to(path)
    for path in (Path(sys.prefix) / "bin").iterdir():
        if path.name not in ("toolchain", "activate"):
            (folder / "bin" / path.name).symlink_to(path)
    (folder / "bin" / "activate").write_text(f"PATH={folder}/bin:$PATH\n")
    server = CommandServer(environment=environment)
    server.write_program(folder / "bin" / "toolchain")
    yield folder
    server.close()


@pytest.fixture(scope="module")
def finished_commands():
    """Commands that already ran for a page; they do not run again for another page."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=[str(page.relative_to(ROOT)) for page in RUN_PAGES])
def test_the_blocks_of_a_page_run_in_order(page, clone, environment_folder, environment, finished_commands):
    for kind, text in blocks(page):
        if kind == "bash":
            new_commands = [
                command for command in commands(text) if command not in NOT_RUN and command not in finished_commands
            ]
            finished_commands |= set(new_commands)
            if not new_commands:
                continue
            lines = [line for line in text.splitlines() if line.startswith("source ") or line in new_commands]
            text = "\n".join(f"{line} --dry-run" if line in PLANNED else line for line in lines)
        program = ["bash", "-euo", "pipefail", "-c"] if kind == "bash" else [sys.executable, "-c"]
        run = subprocess.run(
            [*program, text], cwd=clone, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert run.returncode == 0, f"{page}:\n{text}\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize(
    ("command", "data"),
    [
        ("variants MODEL", {"settings"}),
        ("validate onnx-int8 MODEL", {"grid_largest_delta"}),
        ("explain onnx-int8 MODEL --profile", {"settings", "by_part", "by_dtype", "files", "operator_shares"}),
        ("explain onnx-int8 MODEL", {"settings", "by_part", "by_dtype", "files"}),
        ("explain E-DATA", set()),
        ("doctor", set()),
        ("compare RUN", {"facts", "memory_bytes", "size_bytes", "noise", "quality"}),
        ("compare RUN --max-drop 2 --provider cpu", {"rows"}),
        ("compare RUN --against OLD", {"rows"}),
        ("plan RUN --rows 1e6 --within 1h --price 1", set()),
        ("plan RUN --qps 100 --p99-ms 50 --variant onnx-int8 --price 1", set()),
    ],
)
def test_json_fields_are_documented(command, data, say, tmp_path, request):
    """Checks that json.md documents every field of the JSON output.

    `data` lists fields of the JSON output. The test skips the keys inside these fields. Some skipped keys are names of
    things, such as the kinds of input in `grid_largest_delta`. Other skipped keys are documented on other pages, such
    as the keys in `facts`. The keys in `rows` are tested with the command `compare RUN`.
    """
    text = (ROOT / "docs" / "reference" / "json.md").read_text()
    old_text = re.sub(r'("created": ")\d{4}', r"\g<1>2020", BENCH.read_text(), count=1)
    (tmp_path / "old.json").write_text(old_text)
    values = {"RUN": [BENCH], "OLD": [tmp_path / "old.json"]}
    if "MODEL" in command:
        tiny = request.getfixturevalue("tiny")
        values["MODEL"] = ["--model", tiny.model, "--exported", tiny.exported]
    code, out, err = say(*(word for part in command.split() for word in values.get(part, [part])), "--json")
    assert code == 0, err
    values_left = [json.loads(out)]
    while values_left:
        value = values_left.pop()
        if isinstance(value, list):
            values_left += value
        elif isinstance(value, dict):
            assert not {key for key in value if f"`{key}`" not in text}
            values_left += [inner for key, inner in value.items() if key not in data]


class Page(HTMLParser):
    """Collects the ids, links, and automatically loaded addresses of a page of the site."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = {""}, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(attributes["href"])
        self.loads += [
            attributes[name] for name in ("src", "srcset", "data", "poster") if attributes.get(name) and tag != "a"
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_on_the_site(site):
    for path in (ROOT / "docs").rglob("*.md"):
        page_path = path.relative_to(ROOT / "docs").with_suffix("")
        page_path = page_path.parent if page_path.name == "index" else page_path
        assert (site / page_path / "index.html").is_file(), path


def test_every_link_of_the_site_has_a_target(site, pages):
    for path, page in pages.items():
        page_name = path.relative_to(site).as_posix()
        for link in page.links + page.loads:
            url = urlsplit(urljoin(f"site:///{page_name}".replace("site", "http", 1), link))
            if url.netloc or url.scheme != "http":
                continue
            target = site / unquote(url.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page_name}: {link}"
            if target in pages and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[target].ids, f"{page_name}: {link}"


def test_the_site_loads_nothing_from_other_servers(site, pages):
    for path, page in pages.items():
        assert not [url for url in page.loads if re.match(r"(https?:)?//", url)], path
        # The theme would load data from other servers to draw mermaid diagrams and to show a repository's star count.
        text = path.read_text()
        assert 'class="mermaid"' not in text, path
        assert "data-md-component=source" not in text.replace('"', ""), path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(\s*[\"']?|@import\s+[\"'])(https?:)?//", path.read_text()), path


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


# Types a word that only one page contains, and waits for the search results.
SEARCH = """new Promise(done => {
    const box = document.querySelector(".md-search__input");
    box.focus();
    box.value = "smoothquant";
    box.dispatchEvent(new KeyboardEvent("keyup"));
    const found = () => [...document.querySelectorAll(".md-search-result__link")].map(link => link.pathname).join(" ");
    const timer = setInterval(() => found() && (clearInterval(timer), done(found())), 100);
    setTimeout(() => done("nothing"), 20000);
})"""


@pytest.mark.web
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install --no-install-recommends chromium")
def test_a_browser_shows_and_searches_the_site(address, site, tmp_path):
    with Chromium(tmp_path / "profile") as browser:
        for width in (1280, 390):
            browser.show_as(width=width)
            for page in ("", "how-to/quantize/", "reference/cli/", "reference/results/", "explanation/int8/"):
                browser.open(address + page)
                fits = browser.run("document.documentElement.scrollWidth <= innerWidth")
                assert fits, f"{page} is wider than a window of {width} pixels"
                urls = [
                    event["params"]["request"]["url"]
                    for event in browser.events
                    if event["method"] == "Network.requestWillBeSent"
                ]
                assert not [url for url in urls if not url.startswith((address, "data:"))], page
        browser.show_as()
        browser.open(address)
        assert "/explanation/int8/" in browser.run(SEARCH)
