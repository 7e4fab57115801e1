"""README and docs/ are run and followed, not believed: commands, code, generated parts, links, the site."""

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
from conftest import ROOT, make_checkpoint
from readme_parts import BENCH, MARKED, PAGES, filled, parts
from test_imports import FLOORS

import toolchain

README = ROOT / "README.md"
GPU = "needs a GPU and installs other packages"
RAY = "needs a cluster; tests/distributed/ runs one"
SAME = "`make bench` or `make ship` does the same"
MINUTES = "takes minutes; tests/tuning/ searches"
# Command → why it is not run here.
NOT_RUN = {
    "make install RUNTIME=gpu": GPU,
    "make install TORCH_INDEX=https://download.pytorch.org/whl/cpu": "needs the network",
    'pip install -c constraints/cpu.txt -e ".[cpu,bnb]"': "installs into the environment that runs the tests",
    ".venv/bin/toolchain bench --provider cuda --save-as reference-t4": GPU,
    'pip install -c constraints/cpu.txt -e ".[cpu,bnb,ray]"    # on every machine': RAY,
    "ray start --head                                          # on one machine; it prints ADDR": RAY,
    "ray start --address ADDR                                  # on the others": RAY,
    "toolchain predict onnx-int8 reviews.csv --output scored.parquet --engine ray --address auto": RAY,
    "toolchain bench --quick --engine ray --address auto": RAY,
    "toolchain compare new.json --against old.json --max-regression 5%": "tests/compare/test_limits.py runs it",
    "toolchain prune --max-drop 1.0": "takes minutes; tests/pruning/ searches",
    "toolchain quantize --sensitivity": "tests/quantization/ measures it",
    "toolchain ship onnx-int8 --target web": SAME,
    "toolchain ship onnx-int8 --target python": SAME,
    "toolchain ship onnx-std onnx-std-int8 --target other": SAME,
    "toolchain tune --max-drop 1.0 --objective latency --budget 20m": MINUTES,
    "toolchain tune --model ./my-checkpoint --train-data train.csv --data validation.csv": MINUTES,
}
# Commands that only plan here, with --dry-run: the tests of their rooms build.
PLANNED = {
    "toolchain bench --quick",
    "toolchain bench --quick --provider cpu --variant torch-fp32 --variant onnx-int8",
    "toolchain export --no-pass residual-sum --name plain",
    "toolchain prune --ratio 0.5 --recover 1",
    "toolchain prune --ratio 0.65 --layers 4 --cost latency --recover 1 --name fast",
    "toolchain quantize --backend torch --scheme int8 --from torch-fp32 --from torch-pruned50",
    "toolchain quantize --embeddings int4 --name small",
    "toolchain quantize --from onnx-pruned50-r1",
    "toolchain quantize --keep-fp32 2 --name careful",
    "toolchain quantize --no-pass padding --name padded",
    "toolchain quantize --scheme int4 --trim-vocab train --name tiny",
}
# The small model of the tests stands for the reference; these pages have its commands. Reference pages have none.
RUN_PAGES = [page for page in PAGES if "reference" not in page.relative_to(ROOT).parts]
BLOCK = re.compile(r"(<!-- client: .* -->\n)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, text) of every block of a page; a client's code is run by tests/ship/ in that client."""
    return [(kind, text) for client, kind, text in BLOCK.findall(page.read_text()) if not client]


def commands(text):
    return [line for line in text.splitlines() if line and not line.startswith("source ")]


def test_the_generated_parts_are_current():
    made, used = parts(), set()
    for page in PAGES:
        text = page.read_text()
        used |= {match[2] for match in MARKED.finditer(text)}
        assert filled(text, made) == text, f"{page} is not current: run `make docs`"
        assert text.count("<!-- begin: ") == len(MARKED.findall(text)), f"{page}: a marker has no end"
    assert used == set(made)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_links_between_files_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_what_is_not_run_is_on_a_page():
    written = {
        command for page in RUN_PAGES for kind, text in blocks(page) if kind == "bash" for command in commands(text)
    }
    assert PLANNED | set(NOT_RUN) <= written


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    for path in Path(toolchain.__file__).parent.rglob("*.py"):
        if path.name == "__init__.py":
            assert f"{path.parent.name}/" in text, f"{path.parent} is not on the map"
        elif path.name != "__main__.py":
            assert re.search(rf"\b{re.escape(path.name)}", text), f"{path} is not on the map"


def test_the_floors_are_those_of_the_imports():
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    shown = {int(floor): set(re.findall(r"`(\w+)(?:\.py)?`", rooms)) for floor, rooms in rows}
    assert shown == {floor: rooms for floor, rooms in enumerate(FLOORS, 1) if "reference" not in rooms}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a newcomer has, with a tiny checkpoint in the reference's place and this environment as `.venv`."""
    marker = Path(sys.prefix) / ".installed"
    if not marker.exists() or not marker.read_text().strip():  # one that names no runtime would be installed anew
        pytest.skip("needs the environment `make install` makes")
    folder = tmp_path_factory.mktemp("clone")
    for path in (ROOT / "Makefile", ROOT / "setup.cfg", ROOT / "pyproject.toml"):
        shutil.copy2(path, folder)  # with its time: make compares it with the installation's
    shutil.copytree(ROOT / "constraints", folder / "constraints")
    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results", ignore=lambda *_: {"local"})
    (folder / "tests").mkdir()
    shutil.copy2(ROOT / "tests" / "tickets.csv", folder / "tests")
    (folder / ".venv").symlink_to(sys.prefix)
    make_checkpoint(folder / "my-checkpoint", width=64, leaning=30)
    rows = "".join(f"a film of {i} words,{i % 2}\n" for i in range(30))
    (folder / "reviews.csv").write_text("review,label\n" + rows)
    return folder


@pytest.fixture(scope="module")
def environment():
    found = {**os.environ, "MAKEFLAGS": "MODEL=./my-checkpoint"}
    # Commands that name no model mean the reference; here they mean the tiny one.
    for command in ("EXPORT", "PRUNE", "QUANTIZE", "BENCH", "COMPARE", "VALIDATE", "VARIANTS", "PREDICT", "SHIP"):
        found[f"TOOLCHAIN_{command}_MODEL"] = "my-checkpoint"
    # A benchmark of every default cell takes minutes even of a tiny model.
    found["TOOLCHAIN_BENCH_VARIANT"] = "torch-fp32 onnx-fp32 onnx-int8"
    # The page of a web bundle needs npm packages; they are tested with the clients.
    found["TOOLCHAIN_SHIP_DEMO"] = "false"
    return found


@pytest.fixture(scope="module")
def done():
    """Commands that a page has run; another page does not run them again."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=[str(page.relative_to(ROOT)) for page in RUN_PAGES])
def test_its_blocks_run_in_order(page, clone, environment, done):
    for kind, text in blocks(page):
        if kind == "bash":
            new = [command for command in commands(text) if command not in NOT_RUN and command not in done]
            done |= set(new)
            if not new:
                continue
            lines = [line for line in text.splitlines() if line.startswith("source ") or line in new]
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
        ("doctor", set()),
        ("compare RUN", {"facts", "memory_bytes", "size_bytes", "noise", "quality"}),
        ("compare RUN --max-drop 2 --provider cpu", {"rows"}),
        ("compare RUN --against OLD", {"rows"}),
    ],
)
def test_json_fields_are_documented(command, data, say, tmp_path, request):
    """Every field but those inside `data`, which have names of other things, or are documented elsewhere."""
    text = (ROOT / "docs" / "reference" / "json.md").read_text()
    earlier = re.sub(r'("created": ")\d{4}', r"\g<1>2020", BENCH.read_text(), count=1)
    (tmp_path / "old.json").write_text(earlier)
    values = {"RUN": [BENCH], "OLD": [tmp_path / "old.json"]}
    if "MODEL" in command:
        tiny = request.getfixturevalue("tiny")
        values["MODEL"] = ["--model", tiny.model, "--exported", tiny.exported]
    code, out, err = say(*(word for part in command.split() for word in values.get(part, [part])), "--json")
    assert code == 0, err
    unread = [json.loads(out)]
    while unread:
        value = unread.pop()
        if isinstance(value, list):
            unread += value
        elif isinstance(value, dict):
            assert not {key for key in value if f"`{key}`" not in text}
            unread += [inner for key, inner in value.items() if key not in data]


class Page(HTMLParser):
    """What a page of the site has: ids, links, and addresses that a browser loads by itself."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = {""}, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(found["href"])
        self.loads += [found[name] for name in ("src", "srcset", "data", "poster") if found.get(name) and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
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
        place = path.relative_to(ROOT / "docs").with_suffix("")
        place = place.parent if place.name == "index" else place
        assert (site / place / "index.html").is_file(), path


def test_every_link_of_the_site_leads_somewhere(site, pages):
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        for link in page.links + page.loads:
            url = urlsplit(urljoin(f"site:///{here}".replace("site", "http", 1), link))
            if url.netloc or url.scheme != "http":
                continue
            target = site / unquote(url.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{here}: {link}"
            if target in pages and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[target].ids, f"{here}: {link}"


def test_the_site_asks_no_other_server(site, pages):
    for path, page in pages.items():
        assert not [url for url in page.loads if re.match(r"(https?:)?//", url)], path
        # The theme loads diagrams and figures of a repository from other servers, where a page has them.
        text = path.read_text()
        assert 'class="mermaid"' not in text, path
        assert "data-md-component=source" not in text.replace('"', ""), path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(\s*[\"']?|@import\s+[\"'])(https?:)?//", path.read_text()), path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


# Types a word that one page has, and waits for the pages found.
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
                wide = browser.run("document.documentElement.scrollWidth <= innerWidth")
                assert wide, f"{page} is wider than a window of {width}"
                asked = [
                    event["params"]["request"]["url"]
                    for event in browser.events
                    if event["method"] == "Network.requestWillBeSent"
                ]
                assert not [url for url in asked if not url.startswith((address, "data:"))], page
        browser.show_as()
        browser.open(address)
        assert "/explanation/int8/" in browser.run(SEARCH)
