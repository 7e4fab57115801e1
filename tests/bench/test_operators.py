"""Tests of the profile of operators."""

import pytest

from toolchain.bench.operators import (
    OTHERS,
    OperatorProfiler,
    Profile,
    largest_shares,
    median_profile,
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


def test_the_median_counts_a_missing_operator_as_zero():
    rounds = [Profile(1, 9, {"Add": 3.0}), Profile(3, 5, {}), Profile(2, 7, {"Mul": 6.0, "Add": 1.0})]
    assert median_profile(rounds) == Profile(2, 7, {"Add": 1.0, "Mul": 0.0})


def test_large_shares_have_a_line_each_and_all_lines_add_up_to_one():
    profile = Profile(1, 90, {"Add": 1.0, "Gelu": 30.0, "MatMul": 69.0})
    assert list(profile.shares) == ["MatMul", "Gelu", "Add"]
    lines = largest_shares(profile.shares)
    assert [name for name, _ in lines] == ["MatMul", "Gelu", OTHERS]
    assert [share for _, share in lines] == pytest.approx([0.69, 0.3, 0.01])


def test_a_profile_names_the_operators_of_the_graph(built_tiny, tmp_path):
    artifact = built_tiny.load("onnx-int8")
    profile = OperatorProfiler(artifact, tmp_path).measure(["a film", "a longer text about a film"])
    # A node that neither a text nor a weight changes disappears when ONNX Runtime opens the graph.
    assert {"QAttention", "DynamicQuantizeMatMul", "LayerNormalization"} & set(profile.operators_us)
    assert profile.tokenizing_us > 0
    assert profile.graph_us > 0
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
