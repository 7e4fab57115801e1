"""Tests of the targets of the Makefile."""

import re
import shutil
import subprocess

from conftest import ROOT

from toolchain.artifacts import publishing
from toolchain.models.locations import LOCATION
from toolchain.ship.targets import clients
from toolchain.system import hardware


def test_help_lists_every_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    output = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == {line.split()[1] for line in output.splitlines()}


def test_clean_lists_the_freed_folders_and_keeps_results_and_user_files(tmp_path):
    shutil.copy2(ROOT / "Makefile", tmp_path)
    (tmp_path / "exported" / "m" / "onnx-fp32").mkdir(parents=True)
    (tmp_path / "exported" / "m" / "onnx-fp32" / "model.onnx").write_bytes(bytes(100_000))
    manifest = f'{{\n "schema": 1,\n "id": "{"0a" * 32}",\n "model": "m"\n}}\n'
    (tmp_path / "exported" / "m" / "onnx-fp32" / "manifest.json").write_text(manifest)
    (tmp_path / "exported" / "m" / LOCATION).write_text("{}")
    work = publishing.work_folder(tmp_path / "exported" / "m" / "onnx-int8")
    (work / "training").mkdir(parents=True)
    (tmp_path / "exported" / ".cache" / hardware.machine()["id"] / "gzip").mkdir(parents=True)
    clients.folder(tmp_path / "exported" / ".cache").mkdir()
    thesis = tmp_path / "exported" / "thesis"
    user_files = [thesis / "chapter.txt", thesis / ".a.lock", thesis / ".a.training" / "notes.txt"]
    user_files += [thesis / "app" / "manifest.json", tmp_path / "exported" / ".cache" / "pip" / "index"]
    for file in user_files:
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
        user_files
    )
    assert [p.name for p in (tmp_path / "exported" / ".cache").iterdir()] == ["pip"]
    failed_run = subprocess.run(
        ["make", "-s", "clean", "EXPORTED="], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed_run.returncode != 0
    assert "EXPORTED is empty" in failed_run.stdout
    assert (tmp_path / "benchmarks" / "results" / "local").is_dir()
