"""Sealed artifacts: publishing, tampering, and the folders of a killed run."""

import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from toolchain.artifacts import manifest, publishing, store
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import Export
from toolchain.errors import ArtifactError, TamperedError


def manifest_of(folder: Path, **changes) -> Manifest:
    values = {
        "model": "m",
        "variant": "onnx-std",
        "source": {"kind": "folder", "ref": "/x", "revision": "sha256:0"},
        "parent": "torch-fp32",
        "parent_id": "ab" * 32,
        "step": Export(18),
        "step_version": 1,
        "files": store.list_files(folder),
        "inputs": (manifest.TensorSpec("input_ids", "int64", ("batch", 7)),),
        "outputs": (),
        "labels": ("NO", "YES"),
        "max_length": 512,
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def published(tmp_path):
    target = tmp_path / "onnx-std"
    with publishing.lock(target, pytest.fail), publishing.scratch_folder(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"weights")
        (scratch / "config.json").write_text("{}")
        return store.publish(scratch, target, manifest_of(scratch))


def test_a_published_artifact_is_read_back_and_no_work_folder_is_left(published, tmp_path):
    found = store.load(tmp_path / "onnx-std")
    assert found == published
    assert found.manifest.size_bytes == 9
    found.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["onnx-std"]


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
    assert str(published.path) in error.value.hint


def test_a_file_that_was_added_is_seen_and_not_passed_on(published, tmp_path):
    (published.path / ".DS_Store").write_text("a file manager's")
    published.verify()
    (published.path / "evil.py").write_text("")
    with pytest.raises(TamperedError, match=r"evil.py is not in its manifest"):
        published.verify()
    (tmp_path / "next").mkdir()
    store.copy_companions(published, tmp_path / "next")
    assert [p.name for p in (tmp_path / "next").iterdir()] == ["config.json"]


def test_a_manifest_changed_by_hand_does_not_add_up(published):
    file = published.path / "manifest.json"
    body = json.loads(file.read_text())
    body["step"]["settings"]["opset"] = 17
    file.write_text(json.dumps(body))
    with pytest.raises(TamperedError, match=rf"{published.path}.*does not match its own id.*Delete the folder"):
        store.load(published.path)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_leaves_its_folder_is_refused(published, path):
    file = published.path / "manifest.json"
    body = json.loads(file.read_text())
    body["files"][0]["path"] = path
    file.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="leaves the folder"):
        store.load(published.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1, "id": 3}'])
def test_a_broken_manifest_is_an_error_in_words(published, text):
    (published.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.load(published.path)


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
        store.load(published.path)


def test_a_folder_that_was_not_built_here_is_not_touched(tmp_path):
    (tmp_path / "onnx-std").mkdir()
    (tmp_path / "onnx-std" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="move it away"):
        store.load(tmp_path / "onnx-std")
    assert store.load(tmp_path / "onnx-fp32") is None


def test_a_failed_build_leaves_what_was_there(published):
    def build():
        with publishing.lock(published.path, pytest.fail), publishing.scratch_folder(published.path) as scratch:
            (scratch / "model.onnx").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    store.load(published.path).verify()
    assert list(published.path.parent.iterdir()) == [published.path]


def _build_and_die(target: Path, moment: str) -> None:
    with publishing.lock(target, lambda: None), publishing.scratch_folder(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"new")
        manifest = manifest_of(scratch)
        if moment == "while building":
            os.kill(os.getpid(), signal.SIGKILL)
        (scratch / "manifest.json").write_text(manifest.to_json())
        target.rename(publishing._backup_folder(target))
        os.kill(os.getpid(), signal.SIGKILL)  # between the two renames


@pytest.mark.parametrize("moment", ["while building", "between renames"])
def test_a_killed_run_loses_nothing(published, moment):
    child = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(published.path, moment))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    with publishing.lock(published.path, pytest.fail):  # the dead run's lock is free, and the next run mends
        store.load(published.path).verify()
        assert (published.path / "model.onnx").read_bytes() == b"weights"
    assert list(published.path.parent.iterdir()) == [published.path]


def _hold(target: Path, held, release) -> None:
    with publishing.lock(target, lambda: None):
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

    with publishing.lock(published.path, waiting):
        assert len(said) == 1
    child.join(30)


def looks_like_ours(folder: Path, name: str) -> list[Path]:
    """A user's files and folders beside a target of that name."""
    made = []
    for other in (f".{name}.old", f".{name}.123.building", f".{name}.training", f".{name}.out.csv.parts"):
        made.append(folder / other / "thesis.txt")
        made[-1].parent.mkdir()
    made += [folder / f".{name}.lock", folder / f".{name}.{publishing.WORK}.lock"]
    for file in made:
        file.write_text("mine")
    return made


@pytest.mark.parametrize("there", [True, False])
def test_user_files_with_similar_names_are_kept(tmp_path, there):
    target = tmp_path / "a"
    mine = looks_like_ours(tmp_path, "a")
    for _ in range(2 if there else 1):
        with publishing.lock(target, pytest.fail), publishing.scratch_folder(target) as scratch:
            (scratch / "model.onnx").write_bytes(b"weights")
            store.publish(scratch, target, manifest_of(scratch))
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)
    assert len(list(tmp_path.iterdir())) == len(mine) + 1


@pytest.mark.parametrize(("name", "other"), [("a", "a.v2"), ("run", "run.2"), ("*", "a"), ("[ab]", "b"), ("a", "a.1")])
def test_a_lock_leaves_the_scratch_of_other_names_alone(tmp_path, name, other):
    with publishing.lock(tmp_path / other, pytest.fail), publishing.scratch_folder(tmp_path / other) as scratch:
        (scratch / "model.onnx").write_bytes(b"weights")
        for _ in range(2):
            with publishing.lock(tmp_path / name, pytest.fail), publishing.scratch_folder(tmp_path / name) as mine:
                assert list(mine.iterdir()) == []
                publishing.replace(mine, tmp_path / name)
        store.publish(scratch, tmp_path / other, manifest_of(scratch))
    store.load(tmp_path / other).verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, other])


def test_a_user_file_in_the_work_folder_is_kept(tmp_path):
    work = publishing.work_folder(tmp_path / "a")
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    with publishing.lock(tmp_path / "a", pytest.fail):
        pass
    assert [p.name for p in work.iterdir()] == ["thesis.txt"]


def test_a_link_in_the_target_s_place_is_replaced_and_not_followed(tmp_path, published):
    published.path.rename(tmp_path / "elsewhere")
    published.path.symlink_to(tmp_path / "elsewhere")
    with publishing.lock(published.path, pytest.fail), publishing.scratch_folder(published.path) as scratch:
        publishing.replace(scratch, published.path)
    assert (tmp_path / "elsewhere" / "model.onnx").read_bytes() == b"weights"
    assert not published.path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "onnx-std"]


def _count(target: Path, times: int) -> None:
    for _ in range(times):
        with publishing.lock(target, lambda: None):
            value = int(target.read_text())
            time.sleep(0.0005)
            target.write_text(str(value + 1))


def test_a_lock_that_is_deleted_when_it_ends_is_held_by_one(tmp_path):
    target = tmp_path / "count"
    target.write_text("0")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_count, args=(target, 40)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 6
    assert target.read_text() == "240"
    assert list(tmp_path.iterdir()) == [target]


def test_the_current_folder_can_be_a_target(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path("."), Path("..", "here")):
        with publishing.lock(target, pytest.fail):
            assert [p.name for p in tmp_path.iterdir() if p.name != "here"] == [f".here.{publishing.WORK}"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_in_words(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with (
        pytest.raises(ArtifactError, match="--exported DIR"),
        publishing.lock(tmp_path / "m" / "onnx-std", pytest.fail),
    ):
        pass


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"cannot be written.*--exported DIR"),
        publishing.lock(tmp_path / "file" / "m" / "onnx-std", pytest.fail),
    ):
        pass


def test_a_full_disk_while_building_is_an_error_in_words(published):
    with (
        pytest.raises(ArtifactError, match="No space left"),
        publishing.lock(published.path, pytest.fail),
        publishing.scratch_folder(published.path),
    ):
        raise OSError(28, "No space left on device")


def test_the_ids_of_the_current_artifacts(built_tiny):
    name = built_tiny.model
    found = store.current_ids(built_tiny.exported, [(name, "onnx-fp32"), ("gone", "onnx-fp32")])
    assert found == {(name, "onnx-fp32"): built_tiny.load("onnx-fp32").manifest.id}
