"""Tests of sources: manifests name the folders of checkpoints, and only this machine knows their paths."""

import shutil

import pytest

from toolchain.artifacts import store
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.errors import CheckpointError
from toolchain.models import locations
from toolchain.models.checkpoints import resolve
from toolchain.models.locations import LOCATION, Source


def test_no_file_of_an_artifact_has_a_path_of_this_machine(built_tiny, tmp_path_factory):
    base = str(tmp_path_factory.getbasetemp().parent)
    for folder in (built_tiny.exported / built_tiny.model).glob("[!.]*"):
        for path in folder.rglob("*"):
            assert base.encode() not in path.read_bytes(), path
    assert built_tiny.load("onnx-int8").manifest.source["ref"] == "tiny"


@pytest.mark.parametrize(
    ("source", "ref", "base"),
    [
        (Source("folder", "/a/b", "sha256:0"), "b", None),
        (Source("folder", "/a/b", "sha256:0", "/c/d"), "b", "./d"),
        (Source("folder", "/a/b", "sha256:0", "user/base"), "b", "user/base"),
        (Source("hub", "user/name", "0" * 40, "/c/d"), "user/name", "./d"),
        (Source("embedded", "reference", "sha256:0"), "reference", None),
    ],
)
def test_a_recorded_source_is_read_back(tmp_path, source, ref, base):
    stored = source.to_manifest()
    assert (stored["ref"], stored.get("base")) == (ref, base)
    locations.record(tmp_path, source)
    assert locations.read(tmp_path, Source(**stored)) == source


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ref": "/a/other", "base": ""}', '{"ref": 3, "base": ""}'])
def test_a_record_that_does_not_match_the_manifest_is_ignored(tmp_path, text):
    (tmp_path / LOCATION).write_text(text)
    source = Source("folder", "b", "sha256:0")
    assert locations.read(tmp_path, source) == source


def test_a_path_in_a_manifest_counts_only_by_its_name(tmp_path):
    forged = Source("folder", "/etc/b", "sha256:0", "/etc/base")
    assert locations.read(tmp_path, forged) == Source("folder", "b", "sha256:0", "./base")
    locations.record(tmp_path, Source("folder", "/home/b", "sha256:0", "/home/base"))
    assert locations.read(tmp_path, forged) == Source("folder", "/home/b", "sha256:0", "/home/base")


def test_artifacts_of_another_machine_are_used_without_the_checkpoint(tiny, tiny_checkpoint, tmp_path, monkeypatch):
    model = tiny.exported / tiny.model
    (model / LOCATION).unlink()
    # A folder of the same name in the working directory is not the checkpoint.
    (tmp_path / tiny.model).mkdir()
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy" / "tiny")
    moved = Workspace(tiny.exported, tiny.model, store_source(tiny))
    built_ids = {name: tiny.load(name).manifest.id for name in ("torch-fp32", "onnx-int8")}
    artifacts = ensure(moved, ["onnx-int8"], {}, lambda event: None)
    assert {name: artifacts[name].manifest.id for name in built_ids} == built_ids
    assert not (model / LOCATION).exists()
    named = Workspace(tiny.exported, *resolve(str(folder), tiny.exported))
    assert (named.model, named.source) == (tiny.model, Source("folder", str(folder)))
    ensure(named, ["onnx-int8"], {}, lambda event: None)
    assert locations.read(model, store_source(tiny)).ref == str(folder)
    (model / LOCATION).unlink()
    shutil.rmtree(tiny.path("torch-fp32"))
    with pytest.raises(CheckpointError, match=r"imported on another machine.*--model FOLDER"):
        ensure(moved, ["torch-fp32"], {}, lambda event: None)


def store_source(workspace):
    """Returns the source of the imported model as its manifest has it."""
    return Source(**store.load(workspace.path("torch-fp32")).manifest.source)
