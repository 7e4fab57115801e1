"""The table of releases: what it says of files, whether releases say the same, and the script that makes it."""

import json
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from readme_parts import script
from test_clients import PHONE, needs_phone

from toolchain.ship.targets.releases import (
    ATTENTION_STATES,
    ORDER,
    RIGHT,
    STATES,
    TABLE,
    Use,
    attention_state,
    find_unsupported,
    oldest_reading_release,
    oldest_supporting_release,
)
from toolchain.ship.targets.uses import attention_kinds, oldest_release, read_needs

LONGER = "key_padding_mask longer than the query"
HEADS, WIDTH = 4, 32


def attention(path, query, key, **given):
    """Saves a MultiHeadAttention, its inputs of these shapes: `mask` or `bias` as given."""
    shapes = {"query": query, "key": key, "value": key, **given}
    names = ["query", "key", "value", "", "mask" if "mask" in given else "", "bias" if "bias" in given else ""]
    kinds = dict.fromkeys(shapes, TensorProto.FLOAT) | {"mask": TensorProto.INT32}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain="com.microsoft", num_heads=HEADS)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, query)]
    sets = [helper.make_opsetid("", 15), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=8), path)
    return path


def kinds_in(path):
    return {use.trait for use in read_needs(path).uses if use.attention_kind}


FULL, ONE = ["batch", "tokens", WIDTH], ["batch", 1, WIDTH]
MASK = ["batch", "tokens"]
FILES = {
    "one query": ((ONE, FULL, {"mask": MASK}), {LONGER}),
    "two queries": ((["batch", 2, WIDTH], FULL, {"mask": MASK}), {LONGER}),
    "as many queries as keys": ((FULL, FULL, {"mask": MASK}), {"key_padding_mask"}),
    "one token, known before": ((ONE, ONE, {"mask": ["batch", 1]}), {"key_padding_mask"}),
    "a bias": ((ONE, FULL, {"bias": ["batch", HEADS, 1, "tokens"]}), {"attention_bias"}),
    "a bias of one head": (
        (ONE, FULL, {"bias": ["batch", 1, 1, "tokens"]}),
        {"attention_bias", "attention_bias of one head"},
    ),
    "a bias of one sentence": (
        (FULL, FULL, {"bias": [1, HEADS, "tokens", "tokens"]}),
        {"attention_bias", "attention_bias of one sentence"},
    ),
    "one sentence, known before": (
        ([1, 1, WIDTH], [1, "tokens", WIDTH], {"bias": [1, HEADS, 1, "tokens"]}),
        {"attention_bias"},
    ),
    "no mask": ((ONE, FULL, {}), set()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_kind_of_attention_is_read_from_the_file(tmp_path, name):
    (query, key, given), kinds = FILES[name]
    assert kinds_in(attention(tmp_path / "model.onnx", query, key, **given)) == kinds


@pytest.mark.parametrize(
    ("operator", "shapes", "kinds"),
    [
        ("MultiHeadAttention", {0: [None, 1, 32], 1: [None, None, 32], 4: [None, None]}, [LONGER]),
        ("MultiHeadAttention", {0: [None, None, 32], 1: [None, None, 32], 4: [None, None]}, ["key_padding_mask"]),
        ("MultiHeadAttention", {0: [2, 4, 1, 8], 1: [2, 4, 7, 8], 4: [2, 7]}, [LONGER]),
        ("MultiHeadAttention", {0: [2, 7, 4, 3, 8], 4: [2, 7]}, ["key_padding_mask"]),  # query, key and value in one
        ("MultiHeadAttention", {0: [2, 1, 32], 1: (), 4: ()}, [LONGER]),
        ("MultiHeadAttention", {0: [], 1: [], 5: []}, ["attention_bias"]),
        ("Attention", {0: [2, 7, 32], 3: [2, 7]}, ["mask_index"]),
        ("QAttention", {0: [2, 7, 32], 5: [2, 7]}, ["mask_index"]),
        ("QAttention", {0: [2, 7, 32], 3: []}, []),
        ("Gelu", {0: [2, 7, 32], 3: []}, []),
    ],
)
def test_the_kind_of_attention_by_shapes(operator, shapes, kinds):
    assert list(attention_kinds(operator, shapes, 4)) == kinds


def test_a_bias_is_of_one_head_only_where_there_are_several():
    shapes = {0: ["batch", 1, 8], 1: ["batch", 7, 8], 5: ["batch", 1, 1, 7]}
    assert list(attention_kinds("MultiHeadAttention", shapes, 1)) == ["attention_bias"]


def test_every_kind_that_is_asked_about_is_read_from_some_file():
    """And the other way round: a kind without an answer would be taken for an attribute that no release has."""
    of_files = {f"MultiHeadAttention: {kind}" for _, kinds in FILES.values() for kind in kinds}
    assert of_files | {"Attention: mask_index", "QAttention: mask_index"} == set(ATTENTION_STATES)
    assert {state for by_release in ATTENTION_STATES.values() for state in by_release.values()} <= set(STATES)


def test_the_first_release_that_is_right(tmp_path):
    mask = read_needs(attention(tmp_path / "mask.onnx", ONE, FULL, mask=MASK))
    bias = read_needs(attention(tmp_path / "bias.onnx", ONE, FULL, bias=["batch", HEADS, 1, "tokens"]))
    assert mask.oldest_release() == "1.21"
    assert bias.oldest_release() == "1.16"
    assert oldest_release(mask, bias) == oldest_release(bias, mask) == "1.21"
    assert oldest_release() == ORDER[0]
    (fault,) = find_unsupported("1.20", mask.uses)
    assert str(fault) == f"MultiHeadAttention with {LONGER} (right since 1.21)"
    assert [attention_state(release, fault.attention_kind) for release in ("1.17", "1.20", "1.21", ORDER[-1])] == [
        "wrong",
        "wrong",
        RIGHT,
        RIGHT,
    ]


def test_a_fault_that_comes_and_goes_counts_to_its_last_release(monkeypatch):
    use = Use("com.microsoft", "Attention", "mask_index")
    assert use.first_release == ORDER[0]
    monkeypatch.setitem(ATTENTION_STATES, "Attention: mask_index", {ORDER[0]: RIGHT, "1.19": "wrong", "1.20": RIGHT})
    assert find_unsupported("1.17", [use]) == [use]
    assert oldest_supporting_release([use]) == "1.20"
    monkeypatch.setitem(ATTENTION_STATES, "Attention: mask_index", {ORDER[0]: RIGHT, ORDER[-1]: "refused"})
    assert oldest_supporting_release([use]) is None
    assert "correct in no known release" in str(use)


def test_the_ir_version_and_the_opset_count(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    for ir_version, opset, first in ((8, 18, "1.15"), (8, 20, "1.17"), (10, 18, "1.18"), (9, 22, "1.21")):
        sets = [helper.make_opsetid("", opset)]
        onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=ir_version), tmp_path / "model.onnx")
        assert read_needs(tmp_path / "model.onnx").oldest_release() == first
    assert oldest_reading_release(ort_format=6) == "1.16"
    assert oldest_reading_release(ir_version=99) is None


@pytest.mark.parametrize(("name", "first"), [("onnx-std", "1.15"), ("onnx-fp32", "1.16"), ("onnx-int8", "1.16")])
def test_the_first_release_of_the_variants_of_today(built_tiny, name, first):
    """A graph that needs a later one is a change to know of."""
    assert read_needs(built_tiny.path(name) / "model.onnx").oldest_release() == first


# The script.


@pytest.fixture(scope="module")
def releases():
    return script("releases")


def stated(release):
    """What the script would find, were the table right."""
    body = json.loads(TABLE.read_text())
    until = ORDER[: ORDER.index(release) + 1]
    operators = {
        name: sorted(what for each in until for what in by_release.get(each, ()))
        for name, by_release in body["operators"].items()
        if set(by_release) & set(until)
    }
    return {
        "version": body["releases"][release]["version"],
        "read": {kind: body["releases"][release][kind] for kind in ("ir_version", "opset", "ort_format")},
        "operators": operators,
        "standard": ["Add", *(name for name, first in body["late"].items() if first in until)],
        **{
            kind: {name: [by[each] for each in until if each in by][-1] for name, by in body[kind].items()}
            for kind in ("answers", "precision")
        },
    }


CHANGES = {
    "a fault": lambda found: found["answers"].update({f"MultiHeadAttention: {LONGER}": "wrong"}),
    "an opset": lambda found: found["read"].update(opset=19),
    "an attribute": lambda found: found["operators"]["Attention"].append("new"),
    "no operator": lambda found: found["operators"].pop("QAttention"),
    "a kernel": lambda found: found["standard"].remove("Gelu"),
    "saturation": lambda found: found["precision"].update({"QAttention, .onnx": "saturates"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_release_that_says_something_else_is_a_difference(releases, change):
    body, found = json.loads(TABLE.read_text()), stated("1.22")
    assert releases.differences(body, found) == []
    CHANGES[change](found)
    (line,) = releases.differences(body, found)
    assert found["version"] in line


def test_the_check_exits_with_3_where_a_release_differs(releases, monkeypatch):
    monkeypatch.setattr(releases.questions, "write", lambda folder: None)
    found = stated("1.22")
    monkeypatch.setattr(releases, "ask", lambda python, folder: found)
    same = CliRunner().invoke(releases.main, ["--check", sys.executable])
    assert (same.exit_code, same.output) == (0, f"{found['version']}: no differences from the table\n")
    CHANGES["a fault"](found)
    other = CliRunner().invoke(releases.main, ["--check", sys.executable, "--check", sys.executable])
    assert other.exit_code == 3
    assert other.output.count("the table says right, 1.22") == 2
    found["version"] = "1.99.0"
    assert CliRunner().invoke(releases.main, ["--check", sys.executable]).exit_code == 3


def test_the_table_is_made_of_answers(releases):
    """Of a few releases: what stays the same stands once, with the first of them."""
    few = ["1.17", "1.20", "1.21"]
    body = releases.table({release: stated(release) for release in few})
    committed = json.loads(TABLE.read_text())
    assert body["releases"] == {release: committed["releases"][release] for release in few}
    assert body["answers"][f"MultiHeadAttention: {LONGER}"] == {"1.17": "wrong", "1.21": "right"}
    assert list(body["operators"]["GatherBlockQuantized"]) == ["1.20"]
    assert body["late"]["Gelu"] == "1.20"
    lost = {release: stated(release) for release in few}
    lost["1.21"]["operators"]["Attention"].pop()
    with pytest.raises(releases.click.ClickException, match=r"1\.21 removed a part of Attention"):
        releases.table(lost)


def test_the_questions_tell_right_from_wrong(tmp_path):
    """The probe says so of a right answer changed in one number, and of a file that is none."""
    probe, questions = script("release_probe"), script("release_questions")
    question = next(each for each in questions.attention() if LONGER in each.name)
    entry = questions._save(tmp_path, question)
    assert probe.answer(entry, tmp_path) == "right"
    question.outputs["y"][-1, 0, 0] += 1e-2
    assert probe.answer(questions._save(tmp_path, question), tmp_path) == "wrong"
    (tmp_path / entry["file"]).write_bytes(b"none")
    assert probe.answer(entry, tmp_path) == "refused"


def test_the_questions_of_8_bit_products_need_more_than_16_bits():
    """In each question some two neighbours do, by numpy: a processor without VNNI cannot answer it right by chance."""
    questions = script("release_questions")
    for question in questions.precision():
        (activations,) = (array for array in question.inputs.values() if array.ndim == 3)
        (weight,) = (i for i in question.model.graph.initializer if len(i.dims) == 2)
        a, b = activations.reshape(-1, activations.shape[-1]).astype(np.int64), onnx.numpy_helper.to_array(weight)
        pairs = a[:, 0::2, None] * b[None, 0::2] + a[:, 1::2, None] * b[None, 1::2]
        assert (np.abs(pairs) > 2**15).mean() > 0.1, question.name


@pytest.mark.slow
@needs_phone
def test_the_oldest_and_the_newest_release_say_what_the_table_says(releases):
    """A wheel of 1.17, and the ONNX Runtime installed here."""
    done = CliRunner().invoke(releases.main, ["--check", str(PHONE), "--check", sys.executable])
    assert done.exit_code == 0, done.output
    assert done.output.count("no differences from the table") == 2
    assert done.output.startswith("1.17.")
