"""Tests of `convert_panics`: a panic becomes an exception, and every other exception passes through."""

import pytest

from toolchain.system.panics import PanicError, convert_panics


class StandInPanic(BaseException):
    """Has the base class of ``pyo3_runtime.PanicException``, which no module exports."""


def test_a_panic_becomes_an_exception():
    with pytest.raises(PanicError, match="the library crashed: index out of range"), convert_panics():
        raise StandInPanic("index out of range")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_an_interrupt_and_an_error_pass_through(kind):
    with pytest.raises(kind), convert_panics():
        raise kind
