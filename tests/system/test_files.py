"""Tests of writing files: a file is complete or absent, and never replaces another file by mistake."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors import SafetensorError

from toolchain.system import files


def raise_not_permitted(*arguments):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["with hard links", "without hard links"])
def links(request, monkeypatch):
    """Runs a test on file systems with and without hard links."""
    if request.param == "without hard links":
        monkeypatch.setattr(os, "link", raise_not_permitted)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_whole_creates_folders_and_replaces_a_file(tmp_path):
    path = tmp_path / "a" / "b" / "r.json"
    files.write_whole(path, "ü")
    files.write_whole(path, b"2")
    assert path.read_bytes() == b"2"
    assert names_in(path.parent) == ["r.json"]
    assert path.stat().st_mode & 0o666 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_keeps_only_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(os, function, raise_not_permitted)
    with pytest.raises(PermissionError):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["r.json"]


def test_write_whole_keeps_a_users_hidden_file(tmp_path):
    user_file = tmp_path / f".r.json.{os.getpid()}"
    user_file.write_text("mine")
    files.write_whole(tmp_path / "r.json", "new")
    assert user_file.read_text() == "mine"


def test_write_whole_without_replace_refuses_an_existing_name(tmp_path, links):
    path = tmp_path / "r.json"
    files.write_whole(path, "first", replace=False)
    with pytest.raises(FileExistsError):
        files.write_whole(path, "second", replace=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "link", "second", replace=False)
    assert path.read_text() == "first"
    assert names_in(tmp_path) == ["link", "r.json"]


def test_a_failed_rename_leaves_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", raise_not_permitted)
    monkeypatch.setattr(os, "replace", raise_not_permitted)
    with pytest.raises(PermissionError):
        files.write_whole(tmp_path / "r.json", "new", replace=False)
    assert names_in(tmp_path) == []


def test_a_refused_flush_of_the_folder_undoes_the_rename(tmp_path, monkeypatch, links):
    source = tmp_path / "source"
    source.write_text("new")
    monkeypatch.setattr(os, "fsync", raise_not_permitted)
    with pytest.raises(PermissionError):
        files.move_to_free(source, tmp_path / "r.json")
    assert names_in(tmp_path) == ["source"]
    assert source.read_text() == "new"


def test_simultaneous_writes_get_separate_files(tmp_path, links):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: files.write_to_free(tmp_path / "r-1Z.json", str(i)), range(24)))
    assert [path.read_text() for path in paths] == [str(i) for i in range(24)]
    assert set(names_in(tmp_path)) == {"r-1Z.json", *(f"r-1Z.{number}.json" for number in range(2, 25))}


def test_a_file_in_place_of_the_folder_raises_an_error(tmp_path):
    (tmp_path / "results").write_text("mine")
    for write in (files.write_whole, files.write_to_free):
        with pytest.raises(NotADirectoryError):
            write(tmp_path / "results" / "r.json", "new")


def test_new_folders_are_flushed_with_their_parents(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", flushed.append)
    files.make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    files.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


@pytest.mark.parametrize("write", [files.write_whole, files.write_to_free])
def test_a_write_flushes_the_folder_after_the_rename(tmp_path, monkeypatch, links, write):
    def check_flush(folder):
        assert (folder / "r.json").read_text() == "new"
        flushed.append(folder)

    flushed = []
    monkeypatch.setattr(files, "flush", check_flush)
    write(tmp_path / "r.json", "new")
    assert flushed == [tmp_path]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.flush(tmp_path)


def test_an_error_without_a_file_gets_the_place(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, files.name_place(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path)
    with pytest.raises(OSError, match=r"^a text$") as error, files.name_place(tmp_path):
        raise OSError("a text")
    assert error.value.filename is None
    with pytest.raises(OSError, match="full") as error, files.writing_in_rust(tmp_path):
        raise SafetensorError("the disk is full")
    assert (error.value.errno, error.value.filename) == (errno.EIO, str(tmp_path))
    with pytest.raises(OSError, match="No space left") as error, files.writing_in_rust(tmp_path):
        raise Exception("No space left on device (os error 28)")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ValueError, match="another error"), files.writing_in_rust(tmp_path):
        raise ValueError("another error")


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    files.write_whole(tmp_path / ("x" * 255), "new")
    with pytest.raises(OSError, match="File name too long") as error:
        files.write_whole(tmp_path / ("x" * 256), "new")
    assert error.value.errno in files.REFUSALS
    assert names_in(tmp_path) == ["x" * 255]


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path):
    (tmp_path / "file").write_text("")
    files.write_cache(tmp_path / "file" / "cached", "1")
    files.write_cache(tmp_path / "cached", "1")
    assert names_in(tmp_path) == ["cached", "file"]
