"""The README is run, not believed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_checkpoint
from readme_parts import README, filled

from toolchain.artifacts import publishing
from toolchain.ship.targets import clients
from toolchain.system import hardware

BLOCKS = re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "make test\n",  # it is what runs this
    ".venv/bin/toolchain tune --max-drop 1.0 --objective latency --budget 20m\n",  # minutes; test_tune.py runs it
}


def test_the_generated_parts_are_current():
    assert filled(README.read_text()) == README.read_text(), "run `make docs`"


def test_the_map_names_every_file():
    text = README.read_text()
    for path in (ROOT / "toolchain").rglob("*.py"):
        name = path.name if path.name != "__init__.py" else f"{path.parent.name}/"
        if path.name not in ("__init__.py", "__main__.py") or name.startswith(
            tuple(folder.name for folder in (ROOT / "toolchain").rglob("*") if (folder / "__init__.py").exists())
        ):
            assert name in text, f"{path} is not on the README's map"


def test_help_lists_every_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == {line.split()[1] for line in shown.splitlines()}


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


@pytest.mark.slow
def test_its_blocks_run_in_order(clone):
    assert len(BLOCKS) >= 5
    environment = {**os.environ, "MAKEFLAGS": "MODEL=./my-checkpoint"}
    # Commands that name no model mean the reference; here they mean the tiny one.
    for command in ("EXPORT", "PRUNE", "QUANTIZE", "BENCH", "COMPARE", "VALIDATE", "VARIANTS", "PREDICT"):
        environment[f"TOOLCHAIN_{command}_MODEL"] = "my-checkpoint"
    # A benchmark of every default cell takes minutes even of a tiny model.
    environment["TOOLCHAIN_BENCH_VARIANT"] = "torch-fp32 onnx-fp32 onnx-int8"
    # The page of a web bundle needs npm packages; they are tested with the clients.
    environment["TOOLCHAIN_SHIP_DEMO"] = "false"
    for block in BLOCKS:
        if block in NOT_RUN:
            continue
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, f"{block}\n{run.stdout}\n{run.stderr}"
    assert (clone / "exported" / "my-checkpoint" / "onnx-int8" / "manifest.json").is_file()
    assert len(list((clone / "benchmarks" / "results" / "local").glob("*.json"))) >= 2


def test_clean_says_what_it_frees_and_keeps_results(tmp_path):
    shutil.copy2(ROOT / "Makefile", tmp_path)
    (tmp_path / "exported" / "m" / "onnx-fp32").mkdir(parents=True)
    (tmp_path / "exported" / "m" / "onnx-fp32" / "model.onnx").write_bytes(bytes(100_000))
    manifest = f'{{\n "schema": 1,\n "id": "{"0a" * 32}",\n "model": "m"\n}}\n'
    (tmp_path / "exported" / "m" / "onnx-fp32" / "manifest.json").write_text(manifest)
    work = publishing.work_folder(tmp_path / "exported" / "m" / "onnx-int8")
    (work / "training").mkdir(parents=True)
    (tmp_path / "exported" / ".cache" / hardware.machine()["id"] / "gzip").mkdir(parents=True)
    clients.folder(tmp_path / "exported" / ".cache").mkdir()
    thesis = tmp_path / "exported" / "thesis"
    mine = [thesis / "chapter.txt", thesis / ".a.lock", thesis / ".a.training" / "notes.txt"]
    mine += [thesis / "app" / "manifest.json", tmp_path / "exported" / ".cache" / "pip" / "index"]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"id": "mine"}')
    (tmp_path / "exported" / "README.md").write_text("")
    (tmp_path / "benchmarks" / "results" / "local").mkdir(parents=True)
    (tmp_path / "toolchain").mkdir()
    (tmp_path / "tests").mkdir()
    run = subprocess.run(["make", "-s", "clean"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"freeing \d+K\s+exported/m/onnx-fp32", run.stdout)
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == [".cache", "README.md", "thesis"]
    assert sorted(p for p in (tmp_path / "exported").rglob("*") if p.is_file() and p.name != "README.md") == sorted(
        mine
    )
    assert [p.name for p in (tmp_path / "exported" / ".cache").iterdir()] == ["pip"]
    empty = subprocess.run(
        ["make", "-s", "clean", "EXPORTED="], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert empty.returncode != 0
    assert "EXPORTED is empty" in empty.stdout
    assert (tmp_path / "benchmarks" / "results" / "local").is_dir()
