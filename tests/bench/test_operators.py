"""Tests of the profile of operators."""

import pytest

from toolchain.bench.operators import (
    AROUND,
    OTHER_PARTS,
    TOKENIZING,
    TOTAL,
    OperatorProfiler,
    largest_parts,
    median_parts,
    operator_times,
    require_profilable,
)
from toolchain.errors import GraphError, SettingsError


def event(operator, microseconds, name="node_kernel_time", cat="Node"):
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": operator}}


def test_operator_times_count_nodes_once():
    events = [
        event("MatMul", 5),
        event("MatMul", 7),
        event("Add", 1),
        event("If", 50),  # its time contains the times of its branch
        event("MatMul", 90, name="node_fence_before"),
        {"cat": "Session", "name": "model_run", "dur": 100},
    ]
    assert operator_times(events) == {"MatMul": 12, "Add": 1}


def test_median_parts_count_a_missing_operator_as_zero():
    rounds = [{TOTAL: 9.0, "Add": 3.0}, {TOTAL: 5.0}, {TOTAL: 7.0}]
    assert median_parts(rounds) == {TOTAL: 7.0, "Add": 0.0}


def test_largest_parts_add_up_to_the_total():
    parts = largest_parts({TOTAL: 100.0, "Add": 1.0, "MatMul": 60.0, "Gelu": 30.0, AROUND: 9.0})
    assert parts == [("MatMul", 60.0), ("Gelu", 30.0), (AROUND, 9.0), (OTHER_PARTS, 1.0)]


def test_a_profile_names_the_operators_of_the_graph(built_tiny, tmp_path):
    artifact = built_tiny.load("onnx-int8")
    parts = OperatorProfiler(artifact, tmp_path).measure(["a film", "a longer text about a film"])
    operators = set(parts) - {TOTAL, TOKENIZING, AROUND}
    # A node that neither a text nor a weight changes disappears when ONNX Runtime opens the graph.
    assert {"QAttention", "DynamicQuantizeMatMul", "LayerNormalization"} & operators
    assert all(parts[name] > 0 for name in (TOTAL, TOKENIZING))
    assert sum(us for name, us in parts.items() if name != TOTAL) == pytest.approx(parts[TOTAL])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "place"), [("torch-int8", "PyTorch"), ("onnx-fp16", "cuda")])
def test_a_variant_of_another_runtime_or_provider_has_no_profile(name, place):
    with pytest.raises(SettingsError, match=f"{name} runs on {place}"):
        require_profilable(name)


def test_an_unreadable_graph_is_one_sentence(tiny, tmp_path):
    artifact = tiny.load("onnx-int8")
    artifact.onnx_path.write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"cannot (load|be read)|is not a valid ONNX model"):
        OperatorProfiler(artifact, tmp_path)
