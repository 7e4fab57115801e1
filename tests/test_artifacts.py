"""Sealing, tampering, publishing, and what a killed run leaves."""

import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from toolchain import artifacts
from toolchain.artifacts import Manifest
from toolchain.errors import ArtifactError, TamperedError
from toolchain.variants import Export


def manifest_of(folder: Path, **changes) -> Manifest:
    values = {
        "model": "m",
        "variant": "onnx-std",
        "source": {"kind": "folder", "ref": "/x", "revision": "sha256:0"},
        "parent": "torch-fp32",
        "parent_id": "ab" * 32,
        "step": Export(18),
        "step_version": 1,
        "files": artifacts.list_files(folder),
        "inputs": (artifacts.TensorSpec("input_ids", "int64", ("batch", 7)),),
        "outputs": (),
        "labels": ("NO", "YES"),
        "max_length": 512,
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def published(tmp_path):
    target = tmp_path / "onnx-std"
    with artifacts.lock(target, pytest.fail), artifacts.building(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"weights")
        (scratch / "config.json").write_text("{}")
        return artifacts.publish(scratch, target, manifest_of(scratch))


def test_what_is_published_is_read_back_and_nothing_else_is_left(published, tmp_path):
    found = artifacts.load(tmp_path / "onnx-std")
    assert found == published
    assert found.manifest.size_bytes == 9
    found.verify()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["onnx-std"]


def test_the_id_follows_content_settings_version_and_parent_but_not_time(published):
    folder = published.path
    same = manifest_of(folder, created="later", environment={"versions": {"torch": "9"}}, facts={"a": 1})
    assert same.id == published.manifest.id
    others = [
        manifest_of(folder, step=Export(17)),
        manifest_of(folder, step_version=2),
        manifest_of(folder, parent_id="cd" * 32),
        manifest_of(folder, files=published.manifest.files[:1]),
        manifest_of(folder, labels=("YES", "NO")),
        manifest_of(folder, max_length=128),
        manifest_of(folder, inputs=()),
    ]
    assert len({m.id for m in others} | {same.id}) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.write_bytes(b"weightz"), "another sha256"),
        (lambda f: f.write_bytes(b"weights and more"), "16 bytes instead of 7"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_a_tampered_file_is_named(published, change, says):
    change(published.path / "model.onnx")
    with pytest.raises(TamperedError, match=says) as error:
        published.verify()
    assert "model.onnx" in error.value.cause
    assert str(published.path) in error.value.mend


def test_a_file_that_was_added_is_seen_and_not_passed_on(published, tmp_path):
    (published.path / ".DS_Store").write_text("a file manager's")
    published.verify()
    (published.path / "evil.py").write_text("")
    with pytest.raises(TamperedError, match=r"evil.py is not in its manifest"):
        published.verify()
    (tmp_path / "next").mkdir()
    artifacts.copy_companions(published, tmp_path / "next")
    assert [p.name for p in (tmp_path / "next").iterdir()] == ["config.json"]


def test_a_manifest_changed_by_hand_does_not_add_up(published):
    file = published.path / "manifest.json"
    body = json.loads(file.read_text())
    body["step"]["settings"]["opset"] = 17
    file.write_text(json.dumps(body))
    with pytest.raises(TamperedError, match=rf"{published.path}.*does not add up.*Delete the folder"):
        artifacts.load(published.path)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_leaves_its_folder_is_refused(published, path):
    entry = artifacts.FileEntry(path, 1, "0")
    (published.path / "manifest.json").write_text(manifest_of(published.path, files=(entry,)).to_json())
    with pytest.raises(ArtifactError, match="leaves the folder"):
        artifacts.load(published.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1, "id": 3}'])
def test_a_broken_manifest_is_an_error_in_words(published, text):
    (published.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifacts.load(published.path)


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": {"kind": "folder", "ref": "/x", "revision": "0", "surprise": 1}},
        {"labels": []},
        {"inputs": []},
        {"max_length": "x"},
        {"files": None},
    ],
)
def test_a_manifest_with_values_of_another_kind_is_an_error_in_words(published, change):
    file = published.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError):
        artifacts.load(published.path)


def test_a_folder_that_was_not_built_here_is_not_touched(tmp_path):
    (tmp_path / "onnx-std").mkdir()
    (tmp_path / "onnx-std" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="move it away"):
        artifacts.load(tmp_path / "onnx-std")
    assert artifacts.load(tmp_path / "onnx-fp32") is None


def test_a_failed_build_leaves_what_was_there(published):
    def build():
        with artifacts.lock(published.path, pytest.fail), artifacts.building(published.path) as scratch:
            (scratch / "model.onnx").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    artifacts.load(published.path).verify()
    assert not list(published.path.parent.glob(".*.building"))


def _build_and_die(target: Path, moment: str) -> None:
    with artifacts.lock(target, lambda: None), artifacts.building(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"new")
        manifest = manifest_of(scratch)
        if moment == "while building":
            os.kill(os.getpid(), signal.SIGKILL)
        (scratch / "manifest.json").write_text(manifest.to_json())
        target.rename(artifacts._old(target))
        os.kill(os.getpid(), signal.SIGKILL)  # between the two renames


@pytest.mark.parametrize("moment", ["while building", "between renames"])
def test_a_killed_run_loses_nothing(published, moment):
    child = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(published.path, moment))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    with artifacts.lock(published.path, pytest.fail):  # the dead run's lock is free, and the next run mends
        artifacts.load(published.path).verify()
        assert (published.path / "model.onnx").read_bytes() == b"weights"
    assert not [p for p in published.path.parent.iterdir() if p.name.endswith((".old", ".building"))]


def _hold(target: Path, held, release) -> None:
    with artifacts.lock(target, lambda: None):
        held.set()
        release.wait(30)


def test_two_runs_do_not_meet(published):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(published.path, held, release))
    child.start()
    assert held.wait(30)
    said = []

    def waiting():
        said.append(time.monotonic())
        release.set()

    with artifacts.lock(published.path, waiting):
        assert len(said) == 1
    child.join(30)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_in_words(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ArtifactError, match="--exported DIR"), artifacts.lock(tmp_path / "m" / "onnx-std", pytest.fail):
        pass


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"cannot be written.*--exported DIR"),
        artifacts.lock(tmp_path / "file" / "m" / "onnx-std", pytest.fail),
    ):
        pass


def test_a_full_disk_while_building_is_an_error_in_words(published):
    with pytest.raises(ArtifactError, match="No space left"), artifacts.building(published.path):
        raise OSError(28, "No space left on device")
