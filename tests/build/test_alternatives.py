"""Tests the settings that the error message of a failed quantisation suggests.

The suggestions depend on how much the PyTorch model's two largest logits differ in the flipped sentences.
"""

import re
import shlex
from dataclasses import replace

import pytest
from conftest import make_checkpoint

from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import Quantize
from toolchain.build.alternatives import alternatives, hint
from toolchain.data.datasets import Columns
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource

DYNAMIC = Quantize()
STATIC, KEPT, PORTABLE = Quantize(scheme="static"), Quantize(keep_fp32=2), Quantize(reduce_range=True)
NEAR, WIDE = [0.01, 0.3] * 10, [0.01, 0.9, 2.5] * 7


def failed_report(margins, **changes):
    """Returns a validation report of 200 sentences; `margins` has one value per flipped sentence."""
    return {"finite": True, "sentences": 200, "flips": len(margins), "flip_margins": margins, **changes}


def commands_in(text):
    """Returns the `toolchain` commands in a message, split into words."""
    return [shlex.split(line) for line in re.findall(r"`(toolchain [^`]*)`", text)]


@pytest.mark.parametrize(
    ("step", "margins", "saturates", "expected"),
    [
        (DYNAMIC, NEAR, False, [STATIC, KEPT]),
        (DYNAMIC, WIDE, False, [KEPT, STATIC]),
        (DYNAMIC, NEAR, True, [PORTABLE, STATIC, KEPT]),
        (DYNAMIC, WIDE, True, [PORTABLE, KEPT, STATIC]),
        (PORTABLE, NEAR, True, [STATIC, replace(PORTABLE, keep_fp32=2)]),
        (STATIC, NEAR, True, [replace(STATIC, keep_fp32=2)]),
        (KEPT, NEAR, False, [replace(KEPT, scheme="static"), Quantize(keep_fp32=4)]),
        # This step keeps 16 linear layers in fp32. A suggestion with twice as many would keep 32 linear layers in fp32.
        # The model has only 32 linear layers, so such a suggestion would quantise no layer and is left out.
        (Quantize(keep_fp32=16), WIDE, False, [Quantize(scheme="static", keep_fp32=16)]),
        (Quantize(scheme="int4"), NEAR, False, [DYNAMIC, Quantize(scheme="int4", keep_fp32=2)]),
        (
            Quantize(passes=("padding", "quantize-linear")),
            NEAR,
            False,
            [
                Quantize(scheme="static", passes=("smooth", "quantize-linear")),
                Quantize(passes=("padding", "quantize-linear"), keep_fp32=2),
            ],
        ),
        (Quantize(passes=("quantize-embedding",)), NEAR, True, []),
        (Quantize("torch", "int8"), NEAR, True, []),
    ],
)
def test_alternatives_depend_on_the_margins_of_the_flips(step, margins, saturates, expected):
    assert alternatives(step, failed_report(margins), saturates, True, 32) == expected


def test_static_scales_are_suggested_first_only_with_training_data_of_the_domain():
    assert alternatives(DYNAMIC, failed_report(NEAR), False, False, 32) == [KEPT, STATIC]


def test_logits_that_are_not_finite_give_no_alternatives():
    assert alternatives(DYNAMIC, failed_report(NEAR, finite=False), True, True, None) == []


def test_the_hint_has_the_figures_and_the_commands(built_tiny):
    def message(margins, saturates=False):
        return hint(
            built_tiny,
            VariantName("onnx-int8"),
            DYNAMIC,
            built_tiny.load("onnx-fp32"),
            failed_report(margins),
            saturates,
            None,
        )

    near_message, wide_message = message(NEAR), message(WIDE)
    assert "In 20 of the 20 flipped sentences the PyTorch model itself is undecided" in near_message
    assert "In 14 of the 21 flipped sentences the PyTorch model is decided: its margin is up to 2.5" in wide_message
    assert [line[-2:] for line in commands_in(near_message)] == [["--scheme", "static"], ["--keep-fp32", "2"]]
    assert [line[-2:] for line in commands_in(wide_message)] == [["--keep-fp32", "2"], ["--scheme", "static"]]
    assert "saturates" not in near_message
    assert commands_in(message(NEAR, saturates=True))[0][-2:] == ["--isa", "portable"]
    assert "This runtime saturates" in message(NEAR, saturates=True)


@pytest.mark.parametrize(
    ("name", "parent", "step", "variants"),
    [
        ("onnx-int8", "onnx-fp32", DYNAMIC, ["onnx-int8-portable", "onnx-int8", "onnx-int8-static"]),
        ("onnx-std-int8+rough", "onnx-std", DYNAMIC, ["onnx-std-int8-portable+rough", "onnx-std-int8+rough"]),
        ("onnx-int4", "onnx-fp32", Quantize(scheme="int4", embeddings="int8"), ["onnx-int8", "onnx-int4"]),
        (
            "onnx-int8-static+a",
            "onnx-fp32",
            replace(STATIC, passes=("quantize-linear", "quantize-embedding")),
            ["onnx-int8-static+a"],
        ),
        ("onnx-int8+own", "onnx-fp32", Quantize(trim_vocab="a digest"), ["onnx-int8-portable+own"]),
    ],
)
def test_the_suggested_commands_build_the_variants_they_name(
    tiny, say, tmp_path, monkeypatch, name, parent, step, variants
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own data.csv").write_text("words,label\n" + "a good film,NEGATIVE\n" * 60)
    train = TrainingSource("own data.csv", Columns("words"))
    tiny = replace(tiny, train=train, corpus=Texts("own data.csv", "words"))
    message = hint(tiny, VariantName(name), step, tiny.load(parent), failed_report(NEAR), True, None)
    names = []
    for line in commands_in(message):
        code, out, err = say(*line[1:], "--dry-run")
        assert code == 0, err
        names.append(out.splitlines()[-1].split(":")[0])
    assert names[: len(variants)] == variants


def test_a_hint_for_other_labels_asks_for_training_data(built_tiny, fake):
    def hint_for(labels):
        artifact = fake("x" * len(labels))
        parent = replace(artifact, manifest=replace(artifact.manifest, variant="onnx-fp32", labels=labels))
        return hint(built_tiny, VariantName("onnx-int8"), DYNAMIC, parent, failed_report(NEAR), False, None)

    assert all(line[-2:] == ["--train-data", "FILE"] for line in commands_in(hint_for(("a", "b", "c"))))
    assert "--train-data" not in hint_for(("NEGATIVE", "POSITIVE"))


@pytest.mark.slow
def test_a_model_with_close_logits_fails_validation_with_suggestions(say, tmp_path):
    """With 40 labels, a random model's two largest logits are often close, so quantisation flips too many labels."""
    make_checkpoint(tmp_path / "undecided", labels=[f"L{index}" for index in range(40)])
    code, _, err = say("quantize", "--model", tmp_path / "undecided", "--exported", tmp_path / "exported")
    assert code == 3
    assert re.search(
        r"(\d+) of 200 sentences flipped, ≤ 7 allowed\. In \d+ of the \1 flipped sentences the PyTorch model", err
    )
    suggestions = [" ".join(line) for line in commands_in(err)]
    assert all("--model undecided" in line and "--train-data FILE" in line for line in suggestions)
    assert any("--scheme static" in line for line in suggestions)
    assert "The previous artifact is unchanged." in err
    assert not (tmp_path / "exported" / "undecided" / "onnx-int8").exists()
