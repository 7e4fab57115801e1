"""Files are written whole or not at all, and never replace a foreign file."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from toolchain.system import files


def no_links(*arguments):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["with hard links", "without hard links"])
def links(request, monkeypatch):
    """Both kinds of file systems."""
    if request.param == "without hard links":
        monkeypatch.setattr(os, "link", no_links)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "r.json"
    files.write_whole(path, "ü")
    files.write_whole(path, b"2")
    assert path.read_bytes() == b"2"
    assert names(path.parent) == ["r.json"]
    assert path.stat().st_mode & 0o666 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(os, fails, no_links)
    with pytest.raises(PermissionError):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["r.json"]


def test_a_user_s_hidden_file_is_not_written_over(tmp_path):
    mine = tmp_path / f".r.json.{os.getpid()}"
    mine.write_text("mine")
    files.write_whole(tmp_path / "r.json", "new")
    assert mine.read_text() == "mine"


def test_a_name_that_is_taken_is_refused(tmp_path, links):
    path = tmp_path / "r.json"
    files.write_whole(path, "first", replace=False)
    with pytest.raises(FileExistsError):
        files.write_whole(path, "second", replace=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "link", "second", replace=False)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["link", "r.json"]


def test_an_empty_file_does_not_hold_the_name_where_the_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", no_links)
    with pytest.raises(PermissionError):
        files.write_whole(tmp_path / "r.json", "new", replace=False)
    assert names(tmp_path) == []


def test_many_at_once_have_a_file_each(tmp_path, links):
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: files.write_to_free(tmp_path / "r-1Z.json", str(i)), range(24)))
    assert [path.read_text() for path in written] == [str(i) for i in range(24)]
    assert set(names(tmp_path)) == {"r-1Z.json", *(f"r-1Z.{number}.json" for number in range(2, 25))}


def test_a_file_in_the_folder_s_place_is_an_error(tmp_path):
    (tmp_path / "results").write_text("mine")
    for write in (files.write_whole, files.write_to_free):
        with pytest.raises(NotADirectoryError):
            write(tmp_path / "results" / "r.json", "new")
