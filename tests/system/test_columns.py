"""Tests of aligned columns."""

import pytest

from toolchain.system.columns import align

ROWS = [["", "cores", "hours"], ["onnx-int8", "2", "11.5"]]
WIDE = ["           cores  hours", "onnx-int8      2   11.5"]


@pytest.mark.parametrize("width", [None, 23, 80])
def test_columns_are_aligned(width):
    assert align(ROWS, width) == WIDE


@pytest.mark.parametrize("width", [22, 17, 5])
def test_columns_that_do_not_fit_follow_below(width):
    assert align(ROWS, width) == [
        *("           cores", "onnx-int8      2"),
        *("           hours", "onnx-int8   11.5"),
    ]
