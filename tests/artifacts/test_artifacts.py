"""Tests of artifacts: publishing, locks, manifests, tampered files, and killed runs."""

import errno
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
        "step": Export(18, "optimum"),
        "step_version": 1,
        "files": store.list_files(folder),
        "inputs": tuple(manifest.TensorSpec(n, "int64", ("batch", 7)) for n in ("input_ids", "attention_mask")),
        "outputs": (),
        "labels": ("NO", "YES"),
        "max_length": 512,
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def artifact(tmp_path):
    target = tmp_path / "onnx-std"
    with publishing.lock(target, pytest.fail), publishing.scratch_folder(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"weights")
        (scratch / "config.json").write_text("{}")
        return store.publish(scratch, target, manifest_of(scratch))


def test_publishing_writes_only_the_artifact_and_load_reads_it_back(artifact, tmp_path):
    loaded_artifact = store.load(tmp_path / "onnx-std")
    assert loaded_artifact == artifact
    assert loaded_artifact.manifest.size_bytes == 9
    loaded_artifact.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["onnx-std"]


def test_the_id_depends_on_content_settings_version_and_parent_but_not_on_time(artifact):
    folder = artifact.path
    same_inputs = manifest_of(folder, created="later", environment={"versions": {"torch": "9"}}, facts={"a": 1})
    assert same_inputs.id == artifact.manifest.id
    other_inputs = [
        manifest_of(folder, step=Export(17, "optimum")),
        manifest_of(folder, step_version=2),
        manifest_of(folder, parent_id="cd" * 32),
        manifest_of(folder, files=artifact.manifest.files[:1]),
        manifest_of(folder, labels=("YES", "NO")),
        manifest_of(folder, max_length=128),
        manifest_of(folder, inputs=()),
    ]
    assert len({m.id for m in other_inputs} | {same_inputs.id}) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.write_bytes(b"weightz"), "does not have the sha256"),
        (lambda f: f.write_bytes(b"weights and more"), "16 bytes instead of 7"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_verify_names_a_tampered_file(artifact, change, message):
    change(artifact.path / "model.onnx")
    with pytest.raises(TamperedError, match=message) as error:
        artifact.verify()
    assert "model.onnx" in error.value.cause
    assert str(artifact.path) in error.value.hint


def test_verify_names_an_added_file_and_copies_leave_it_out(artifact, tmp_path):
    (artifact.path / ".DS_Store").write_text("a file manager's")
    artifact.verify()
    (artifact.path / "evil.py").write_text("")
    with pytest.raises(TamperedError, match=r"evil.py is not in the manifest"):
        artifact.verify()
    (tmp_path / "next").mkdir()
    store.copy_companions(artifact, tmp_path / "next")
    assert [p.name for p in (tmp_path / "next").iterdir()] == ["config.json"]


def test_load_refuses_a_manifest_edited_by_hand(artifact):
    file = artifact.path / "manifest.json"
    body = json.loads(file.read_text())
    body["step"]["settings"]["opset"] = 17
    file.write_text(json.dumps(body))
    with pytest.raises(TamperedError, match=rf"{artifact.path}.*does not match its own id.*Delete the folder"):
        store.load(artifact.path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"variant": "onnx-fp32"},
        {"source": {"kind": "folder", "ref": "other", "revision": "sha256:0"}},
        {"validation": {"passed": True}},
        {"facts": {"int8_headroom": 9}},
        {"environment": {}, "created": "2020-01-01"},
        {"seal": "0" * 64},
    ],
)
def test_the_seal_covers_every_entry_of_the_manifest(artifact, change):
    file = artifact.path / "manifest.json"
    body = json.loads(file.read_text())
    assert {**body, **change} != body
    file.write_text(json.dumps({**body, **change}))
    with pytest.raises(TamperedError, match="does not match its own seal"):
        store.load(artifact.path)


def test_the_layout_of_the_text_does_not_change_the_seal(artifact):
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items()))))
    assert store.load(artifact.path) == artifact


def test_a_manifest_of_an_older_release_is_unsealed(artifact):
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "seal"}))
    loaded_artifact = store.load(artifact.path)
    assert (artifact.manifest.sealed, loaded_artifact.manifest.sealed) == (True, False)
    assert loaded_artifact.manifest.id == artifact.manifest.id


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_load_refuses_a_manifest_with_a_path_outside_its_folder(artifact, path):
    file = artifact.path / "manifest.json"
    body = json.loads(file.read_text())
    body["files"][0]["path"] = path
    file.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="is outside the artifact's folder"):
        store.load(artifact.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1, "id": 3}'])
def test_a_broken_manifest_raises_an_artifact_error(artifact, text):
    (artifact.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.load(artifact.path)


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": {"kind": "folder", "ref": "/x", "revision": "0", "surprise": 1}},
        {"labels": []},
        {"inputs": []},
        {"max_length": "x"},
        {"files": None},
        {"files": [{"path": "x" * 300, "bytes": 0, "sha256": "0" * 64}]},
        {"files": [{"path": "x", "bytes": 0, "sha256": "0"}]},
        {"source": {"kind": "folder", "ref": "/" + "x" * 300, "revision": "0"}},
        {"source": {"kind": "url", "ref": "/x", "revision": "0"}},
        {"model": "../m"},
        {"max_length": 0},
        {"facts": {"pruning": {"method": "fisher"}}},
        {"facts": {"bytes_by_part": {"encoder": "many"}}},
        {"facts": {"surprise": "a\x1b[2J"}},
        {"validation": {"passed": "yes"}},
        {"environment": {"versions": {"torch": 2}}},
        {"inputs": [{"name": "input_ids", "dtype": "int64", "shape": []}]},
        {"outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}]},
    ],
)
def test_a_manifest_with_values_of_the_wrong_type_raises_an_artifact_error(artifact, change):
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.load(artifact.path)


def test_load_refuses_a_folder_without_a_manifest(tmp_path):
    (tmp_path / "onnx-std").mkdir()
    (tmp_path / "onnx-std" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="Move the folder away"):
        store.load(tmp_path / "onnx-std")
    assert store.load(tmp_path / "onnx-fp32") is None


def test_a_failed_build_keeps_the_old_artifact(artifact):
    def build():
        with publishing.lock(artifact.path, pytest.fail), publishing.scratch_folder(artifact.path) as scratch:
            (scratch / "model.onnx").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    store.load(artifact.path).verify()
    assert list(artifact.path.parent.iterdir()) == [artifact.path]


def _build_and_die(target: Path, kill_point: str) -> None:
    with publishing.lock(target, lambda: None), publishing.scratch_folder(target) as scratch:
        (scratch / "model.onnx").write_bytes(b"new")
        manifest = manifest_of(scratch)
        if kill_point == "while building":
            os.kill(os.getpid(), signal.SIGKILL)
        (scratch / "manifest.json").write_text(manifest.to_json())
        target.rename(publishing._backup_folder(target))
        # The process dies after it renamed the old artifact and before it renames the new artifact.
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kill_point", ["while building", "between renames"])
def test_a_killed_run_keeps_the_old_artifact(artifact, kill_point):
    child = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(artifact.path, kill_point))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    # The killed process no longer holds the lock on the artifact. The function `publishing.lock` deletes the new files
    # of the killed process. If the killed process renamed the old artifact, `publishing.lock` restores the old name.
    with publishing.lock(artifact.path, pytest.fail):
        store.load(artifact.path).verify()
        assert (artifact.path / "model.onnx").read_bytes() == b"weights"
    assert list(artifact.path.parent.iterdir()) == [artifact.path]


def test_all_files_are_on_the_disk_before_they_are_published(artifact, monkeypatch):
    events = []
    target = artifact.path

    def record_flush(descriptor):
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    def record_rename(source, destination):
        events.append(("rename", str(destination)))
        os.rename(source, destination)

    with publishing.lock(target, pytest.fail), publishing.scratch_folder(target) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "model.onnx").write_bytes(b"new")
        names_before = [*scratch.rglob("*"), scratch / "manifest.json"]
        monkeypatch.setattr(os, "fsync", record_flush)
        monkeypatch.setattr(Path, "rename", record_rename)
        store.publish(scratch, target, manifest_of(scratch))
    published = events.index(("rename", str(target)))
    flushed = {name for event, name in events[:published] if event == "flush"}
    assert flushed == {str(scratch), *(str(path) for path in names_before)}
    assert events[published + 1 :] == [("flush", str(target.parent))]


def test_a_disk_that_refuses_the_rename_keeps_the_old_artifact(artifact, monkeypatch):
    def refuse_folder(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(artifact.path.parent):
            raise OSError(errno.EIO, "Input/output error")

    def build():
        with publishing.lock(artifact.path, pytest.fail), publishing.scratch_folder(artifact.path) as scratch:
            (scratch / "model.onnx").write_bytes(b"new")
            monkeypatch.setattr(os, "fsync", refuse_folder)
            store.publish(scratch, artifact.path, manifest_of(scratch))

    with pytest.raises(ArtifactError, match="Input/output error"):
        build()
    assert store.load(artifact.path) == artifact
    artifact.verify()
    assert list(artifact.path.parent.iterdir()) == [artifact.path]


def _hold(target: Path, lock_taken, release) -> None:
    with publishing.lock(target, lambda: None):
        lock_taken.set()
        release.wait(30)


def test_a_second_run_waits_for_the_lock_of_the_first(artifact):
    context = multiprocessing.get_context("fork")
    lock_taken, release = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(artifact.path, lock_taken, release))
    child.start()
    assert lock_taken.wait(30)
    wait_times = []

    def release_after_wait():
        wait_times.append(time.monotonic())
        release.set()

    with publishing.lock(artifact.path, release_after_wait):
        assert len(wait_times) == 1
    child.join(30)


def write_lookalikes(folder: Path, name: str) -> list[Path]:
    """Writes a user's files beside the artifact `name`, with names like those of the toolchain's temporary files."""
    user_files = []
    for entry in (f".{name}.old", f".{name}.123.building", f".{name}.training", f".{name}.out.csv.parts"):
        user_files.append(folder / entry / "thesis.txt")
        user_files[-1].parent.mkdir()
    user_files += [folder / f".{name}.lock", folder / f".{name}.{publishing.WORK}.lock"]
    for file in user_files:
        file.write_text("mine")
    return user_files


@pytest.mark.parametrize("target_exists", [True, False])
def test_publishing_keeps_user_files_with_similar_names(tmp_path, target_exists):
    target = tmp_path / "a"
    user_files = write_lookalikes(tmp_path, "a")
    for _ in range(2 if target_exists else 1):
        with publishing.lock(target, pytest.fail), publishing.scratch_folder(target) as scratch:
            (scratch / "model.onnx").write_bytes(b"weights")
            store.publish(scratch, target, manifest_of(scratch))
    assert [file.read_text() for file in user_files] == ["mine"] * len(user_files)
    assert len(list(tmp_path.iterdir())) == len(user_files) + 1


@pytest.mark.parametrize(
    ("name", "other_name"), [("a", "a.v2"), ("run", "run.2"), ("*", "a"), ("[ab]", "b"), ("a", "a.1")]
)
def test_a_lock_keeps_the_scratch_folders_of_other_names(tmp_path, name, other_name):
    with (
        publishing.lock(tmp_path / other_name, pytest.fail),
        publishing.scratch_folder(tmp_path / other_name) as scratch,
    ):
        (scratch / "model.onnx").write_bytes(b"weights")
        for _ in range(2):
            with (
                publishing.lock(tmp_path / name, pytest.fail),
                publishing.scratch_folder(tmp_path / name) as own_scratch,
            ):
                assert list(own_scratch.iterdir()) == []
                publishing.replace(own_scratch, tmp_path / name)
        store.publish(scratch, tmp_path / other_name, manifest_of(scratch))
    store.load(tmp_path / other_name).verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, other_name])


def test_a_lock_keeps_user_files_in_the_work_folder(tmp_path):
    work = publishing.work_folder(tmp_path / "a")
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    with publishing.lock(tmp_path / "a", pytest.fail):
        pass
    assert [p.name for p in work.iterdir()] == ["thesis.txt"]


def test_replace_removes_a_link_and_keeps_the_folder_behind_it(tmp_path, artifact):
    artifact.path.rename(tmp_path / "elsewhere")
    artifact.path.symlink_to(tmp_path / "elsewhere")
    with publishing.lock(artifact.path, pytest.fail), publishing.scratch_folder(artifact.path) as scratch:
        publishing.replace(scratch, artifact.path)
    assert (tmp_path / "elsewhere" / "model.onnx").read_bytes() == b"weights"
    assert not artifact.path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "onnx-std"]


def _count(target: Path, times: int) -> None:
    for _ in range(times):
        with publishing.lock(target, lambda: None):
            value = int(target.read_text())
            time.sleep(0.0005)
            target.write_text(str(value + 1))


def test_only_one_process_at_a_time_holds_a_lock(tmp_path):
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
def test_a_folder_without_write_permission_raises_an_artifact_error(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with (
        pytest.raises(ArtifactError, match="--exported DIR"),
        publishing.lock(tmp_path / "m" / "onnx-std", pytest.fail),
    ):
        pass


def test_a_file_in_place_of_a_folder_raises_an_artifact_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"cannot be written.*--exported DIR"),
        publishing.lock(tmp_path / "file" / "m" / "onnx-std", pytest.fail),
    ):
        pass


def test_a_full_disk_while_building_raises_an_artifact_error(artifact):
    with (
        pytest.raises(ArtifactError, match="No space left"),
        publishing.lock(artifact.path, pytest.fail),
        publishing.scratch_folder(artifact.path),
    ):
        raise OSError(28, "No space left on device")


def test_current_ids_has_only_artifacts_that_exist(built_tiny):
    name = built_tiny.model
    ids = store.current_ids(built_tiny.exported, [(name, "onnx-fp32"), ("gone", "onnx-fp32")])
    assert ids == {(name, "onnx-fp32"): built_tiny.load("onnx-fp32").manifest.id}


def test_the_compressed_size_is_known_where_the_cache_cannot_be_written(artifact, tmp_path):
    (tmp_path / "file").write_text("")
    size = store.gzip_bytes(artifact, tmp_path / "cache")
    assert size == store.gzip_bytes(artifact, tmp_path / "file" / "cache") > 0
    assert (tmp_path / "cache" / artifact.manifest.id).read_text() == str(size)
