"""Tests of a child process that answers messages."""

import errno

import pytest

from toolchain.errors import BenchError
from toolchain.system.child import Child


class EchoingChild(Child):
    def _make_error(self, cause):
        return BenchError(cause)


@pytest.fixture
def child():
    process = EchoingChild("toolchain.data.columnar_worker", {})
    process.ask({"row_bytes": 1, "memory_bytes": 1 << 30}, 60)
    yield process
    process.close()


def test_a_refused_message_to_a_running_child_is_an_error_of_the_system(child, monkeypatch):
    def refuse(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(child._process.stdin, "write", refuse, raising=False)
    with pytest.raises(OSError, match="No space left"):
        child.ask({"do": "open", "file": "none.parquet"}, 60)


def test_a_message_to_a_killed_child_gives_the_end_of_the_child(child):
    child._process.kill()
    child._process.wait()
    with pytest.raises(BenchError, match="was killed"):
        child.ask({"do": "open", "file": "none.parquet"}, 60)


def test_an_unexpected_error_in_the_child_reaches_the_parent(child):
    with pytest.raises(Exception, match="AttributeError"):
        child.ask({"do": "nothing"}, 60)
