"""Tests of the table of ONNX Runtime releases, the code that reads this table, and the script that builds it."""

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


def attention(path, query, key, **mask_shapes):
    """Saves a model of one MultiHeadAttention with inputs of the given shapes, and an optional `mask` or `bias`."""
    shapes = {"query": query, "key": key, "value": key, **mask_shapes}
    names = [
        "query",
        "key",
        "value",
        "",
        "mask" if "mask" in mask_shapes else "",
        "bias" if "bias" in mask_shapes else "",
    ]
    kinds = dict.fromkeys(shapes, TensorProto.FLOAT) | {"mask": TensorProto.INT32}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain="com.microsoft", num_heads=HEADS)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, query)]
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def kinds_in(path):
    return {use.trait for use in read_needs(path).uses if use.attention_kind}


ALL_TOKENS, ONE_TOKEN = ["batch", "tokens", WIDTH], ["batch", 1, WIDTH]
MASK = ["batch", "tokens"]
FILES = {
    "one query": ((ONE_TOKEN, ALL_TOKENS, {"mask": MASK}), {LONGER}),
    "two queries": ((["batch", 2, WIDTH], ALL_TOKENS, {"mask": MASK}), {LONGER}),
    "as many queries as keys": ((ALL_TOKENS, ALL_TOKENS, {"mask": MASK}), {"key_padding_mask"}),
    "one query and one key": ((ONE_TOKEN, ONE_TOKEN, {"mask": ["batch", 1]}), {"key_padding_mask"}),
    "an attention bias": ((ONE_TOKEN, ALL_TOKENS, {"bias": ["batch", HEADS, 1, "tokens"]}), {"attention_bias"}),
    "one attention bias for all heads": (
        (ONE_TOKEN, ALL_TOKENS, {"bias": ["batch", 1, 1, "tokens"]}),
        {"attention_bias", "attention_bias of one head"},
    ),
    "one attention bias for all sentences": (
        (ALL_TOKENS, ALL_TOKENS, {"bias": [1, HEADS, "tokens", "tokens"]}),
        {"attention_bias", "attention_bias of one sentence"},
    ),
    "a batch that always has one sentence": (
        ([1, 1, WIDTH], [1, "tokens", WIDTH], {"bias": [1, HEADS, 1, "tokens"]}),
        {"attention_bias"},
    ),
    "no mask": ((ONE_TOKEN, ALL_TOKENS, {}), set()),
}


@pytest.mark.parametrize("name", FILES)
def test_read_needs_finds_the_kind_of_attention(tmp_path, name):
    (query, key, mask_shapes), kinds = FILES[name]
    assert kinds_in(attention(tmp_path / "model.onnx", query, key, **mask_shapes)) == kinds


@pytest.mark.parametrize(
    ("operator", "shapes", "kinds"),
    [
        ("MultiHeadAttention", {0: [None, 1, 32], 1: [None, None, 32], 4: [None, None]}, [LONGER]),
        ("MultiHeadAttention", {0: [None, None, 32], 1: [None, None, 32], 4: [None, None]}, ["key_padding_mask"]),
        ("MultiHeadAttention", {0: [2, 4, 1, 8], 1: [2, 4, 7, 8], 4: [2, 7]}, [LONGER]),
        # Query, key and value are packed in one input.
        ("MultiHeadAttention", {0: [2, 7, 4, 3, 8], 4: [2, 7]}, ["key_padding_mask"]),
        ("MultiHeadAttention", {0: [2, 1, 32], 1: (), 4: ()}, [LONGER]),
        ("MultiHeadAttention", {0: [], 1: [], 5: []}, ["attention_bias"]),
        ("Attention", {0: [2, 7, 32], 3: [2, 7]}, ["mask_index"]),
        ("QAttention", {0: [2, 7, 32], 5: [2, 7]}, ["mask_index"]),
        ("QAttention", {0: [2, 7, 32], 3: []}, []),
        ("Gelu", {0: [2, 7, 32], 3: []}, []),
    ],
)
def test_the_kind_of_attention_depends_on_the_shapes(operator, shapes, kinds):
    assert list(attention_kinds(operator, shapes, 4)) == kinds


def test_a_bias_of_one_head_needs_several_heads():
    shapes = {0: ["batch", 1, 8], 1: ["batch", 7, 8], 5: ["batch", 1, 1, 7]}
    assert list(attention_kinds("MultiHeadAttention", shapes, 1)) == ["attention_bias"]


def test_the_table_has_every_kind_of_attention_in_the_files():
    """Compares the kinds of attention in model files with the kinds in the table of ONNX Runtime releases.

    If the table lacked a kind of attention, the toolchain would assume that no release supports this kind.
    """
    kinds_of_files = {f"MultiHeadAttention: {kind}" for _, kinds in FILES.values() for kind in kinds}
    assert kinds_of_files | {"Attention: mask_index", "QAttention: mask_index"} == set(ATTENTION_STATES)
    assert {state for by_release in ATTENTION_STATES.values() for state in by_release.values()} <= set(STATES)


def test_the_oldest_release_is_the_first_that_computes_correctly(tmp_path):
    mask_needs = read_needs(attention(tmp_path / "mask.onnx", ONE_TOKEN, ALL_TOKENS, mask=MASK))
    bias_needs = read_needs(
        attention(tmp_path / "bias.onnx", ONE_TOKEN, ALL_TOKENS, bias=["batch", HEADS, 1, "tokens"])
    )
    assert mask_needs.oldest_release() == "1.21"
    assert bias_needs.oldest_release() == "1.16"
    assert oldest_release(mask_needs, bias_needs) == oldest_release(bias_needs, mask_needs) == "1.21"
    assert oldest_release() == ORDER[0]
    (fault,) = find_unsupported("1.20", mask_needs.uses)
    assert str(fault) == f"MultiHeadAttention with {LONGER} (correct from 1.21 on)"
    assert [attention_state(release, fault.attention_kind) for release in ("1.17", "1.20", "1.21", ORDER[-1])] == [
        "wrong",
        "wrong",
        RIGHT,
        RIGHT,
    ]


def test_the_oldest_release_follows_the_last_faulty_one(monkeypatch):
    use = Use("com.microsoft", "Attention", "mask_index")
    assert use.first_release == ORDER[0]
    monkeypatch.setitem(ATTENTION_STATES, "Attention: mask_index", {ORDER[0]: RIGHT, "1.19": "wrong", "1.20": RIGHT})
    assert find_unsupported("1.17", [use]) == [use]
    assert oldest_supporting_release([use]) == "1.20"
    monkeypatch.setitem(ATTENTION_STATES, "Attention: mask_index", {ORDER[0]: RIGHT, ORDER[-1]: "refused"})
    assert oldest_supporting_release([use]) is None
    assert "correct in no known release" in str(use)


def test_the_oldest_release_depends_on_ir_version_and_opset(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    for ir_version, opset, release in ((8, 18, "1.15"), (8, 20, "1.17"), (10, 18, "1.18"), (9, 22, "1.21")):
        opsets = [helper.make_opsetid("", opset)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), tmp_path / "model.onnx")
        assert read_needs(tmp_path / "model.onnx").oldest_release() == release
    assert oldest_reading_release(ort_format=6) == "1.16"
    assert oldest_reading_release(ir_version=99) is None


@pytest.mark.parametrize(("name", "release"), [("onnx-std", "1.15"), ("onnx-fp32", "1.16"), ("onnx-int8", "1.16")])
def test_the_oldest_release_of_each_variant_stays_the_same(built_tiny, name, release):
    """Fails if a change of the toolchain makes a graph need a later release of ONNX Runtime than `release`."""
    assert read_needs(built_tiny.path(name) / "model.onnx").oldest_release() == release


# --- releases.py


@pytest.fixture(scope="module")
def releases():
    return script("releases")


def answers_of(release):
    """Returns the results that the committed table of releases contains for ONNX Runtime `release`.

    If the table is correct, the script releases.py measures the same results with this release.
    """
    body = json.loads(TABLE.read_text())
    releases_until = ORDER[: ORDER.index(release) + 1]
    operators = {
        name: sorted(
            attribute for earlier_release in releases_until for attribute in by_release.get(earlier_release, ())
        )
        for name, by_release in body["operators"].items()
        if set(by_release) & set(releases_until)
    }
    return {
        "version": body["releases"][release]["version"],
        "read": {kind: body["releases"][release][kind] for kind in ("ir_version", "opset", "ort_format")},
        "operators": operators,
        "standard": ["Add", *(name for name, first in body["late"].items() if first in releases_until)],
        **{
            kind: {
                name: [
                    answer_by_release[earlier_release]
                    for earlier_release in releases_until
                    if earlier_release in answer_by_release
                ][-1]
                for name, answer_by_release in body[kind].items()
            }
            for kind in ("answers", "precision")
        },
    }


CHANGES = {
    "a fault": lambda answers: answers["answers"].update({f"MultiHeadAttention: {LONGER}": "wrong"}),
    "an opset": lambda answers: answers["read"].update(opset=19),
    "an attribute": lambda answers: answers["operators"]["Attention"].append("new"),
    "no operator": lambda answers: answers["operators"].pop("QAttention"),
    "a kernel": lambda answers: answers["standard"].remove("Gelu"),
    "saturation": lambda answers: answers["precision"].update({"QAttention, .onnx": "saturates"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_differences_finds_each_answer_that_the_table_does_not_have(releases, change):
    body, answers = json.loads(TABLE.read_text()), answers_of("1.22")
    assert releases.differences(body, answers) == []
    CHANGES[change](answers)
    (line,) = releases.differences(body, answers)
    assert answers["version"] in line


def test_the_check_exits_with_3_where_a_release_differs(releases, monkeypatch):
    monkeypatch.setattr(releases.questions, "write", lambda folder: None)
    answers = answers_of("1.22")
    monkeypatch.setattr(releases, "ask", lambda python, folder: answers)
    matching_run = CliRunner().invoke(releases.main, ["--check", sys.executable])
    assert (matching_run.exit_code, matching_run.output) == (
        0,
        f"ONNX Runtime {answers['version']}: no differences from the table of releases\n",
    )
    CHANGES["a fault"](answers)
    failed_run = CliRunner().invoke(releases.main, ["--check", sys.executable, "--check", sys.executable])
    assert failed_run.exit_code == 3
    message = f"the table of releases has the result 'right', but ONNX Runtime {answers['version']} gives 'wrong'"
    assert failed_run.output.count(message) == 2
    answers["version"] = "1.99.0"
    assert CliRunner().invoke(releases.main, ["--check", sys.executable]).exit_code == 3


def test_the_script_builds_the_table_from_answers(releases):
    """Checks that the table of ONNX Runtime releases omits repeated results.

    For each test model, the table lists only releases whose result differs from the previous release's result.
    """
    three_releases = ["1.17", "1.20", "1.21"]
    body = releases.table({release: answers_of(release) for release in three_releases})
    committed_table = json.loads(TABLE.read_text())
    assert body["releases"] == {release: committed_table["releases"][release] for release in three_releases}
    assert body["answers"][f"MultiHeadAttention: {LONGER}"] == {"1.17": "wrong", "1.21": "right"}
    assert list(body["operators"]["GatherBlockQuantized"]) == ["1.20"]
    assert body["late"]["Gelu"] == "1.20"
    changed_answers = {release: answers_of(release) for release in three_releases}
    changed_answers["1.21"]["operators"]["Attention"].pop()
    with pytest.raises(releases.click.ClickException, match=r"1\.21 removed an attribute or an input of Attention"):
        releases.table(changed_answers)


def test_the_probe_tells_right_wrong_and_refused_apart(tmp_path):
    """Runs release_probe.py on a valid model, on a model with wrong expected outputs, and on an invalid file."""
    probe, questions = script("release_probe"), script("release_questions")
    question = next(candidate for candidate in questions.attention() if LONGER in candidate.name)
    entry = questions._save(tmp_path, question)
    assert probe.answer(entry, tmp_path) == "right"
    question.outputs["y"][-1, 0, 0] += 1e-2
    assert probe.answer(questions._save(tmp_path, question), tmp_path) == "wrong"
    (tmp_path / entry["file"]).write_bytes(b"none")
    assert probe.answer(entry, tmp_path) == "refused"


def test_the_questions_of_8_bit_products_need_more_than_16_bits():
    """In each test model of 8-bit products, the sums of some pairs of products need more than 16 bits.

    A processor without VNNI saturates sums above 16 bits, so such a processor cannot give the right result by chance.
    """
    questions = script("release_questions")
    for question in questions.precision():
        (activations,) = (array for array in question.inputs.values() if array.ndim == 3)
        (weight,) = (i for i in question.model.graph.initializer if len(i.dims) == 2)
        a, b = activations.reshape(-1, activations.shape[-1]).astype(np.int64), onnx.numpy_helper.to_array(weight)
        pairs = a[:, 0::2, None] * b[None, 0::2] + a[:, 1::2, None] * b[None, 1::2]
        assert (np.abs(pairs) > 2**15).mean() > 0.1, question.name


@pytest.mark.slow
@needs_phone
def test_the_oldest_and_the_newest_release_match_the_table(releases):
    """Compares two installed releases of ONNX Runtime with the table of releases.

    `make test-clients` installs ONNX Runtime 1.17; the environment of the tests has the newest release.
    """
    check_result = CliRunner().invoke(releases.main, ["--check", str(PHONE), "--check", sys.executable])
    assert check_result.exit_code == 0, check_result.output
    assert check_result.output.count("no differences from the table") == 2
    assert check_result.output.startswith("ONNX Runtime 1.17.")
