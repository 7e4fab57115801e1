"""A quantisation that fails validation says what to try, by what flipped."""

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


def failed(margins, **others):
    """A report of so many flips of 200 sentences."""
    return {"finite": True, "sentences": 200, "flips": len(margins), "flip_margins": margins, **others}


def commands(text):
    """The command lines in a message."""
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
        (Quantize(keep_fp32=16), WIDE, False, [Quantize(scheme="static", keep_fp32=16)]),  # 32 layers are all there are
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
def test_what_to_try_follows_the_flips(step, margins, saturates, expected):
    assert alternatives(step, failed(margins), saturates, True, 32) == expected


def test_static_scales_come_first_only_in_their_own_domain():
    assert alternatives(DYNAMIC, failed(NEAR), False, False, 32) == [KEPT, STATIC]


def test_answers_that_are_not_finite_suggest_nothing():
    assert alternatives(DYNAMIC, failed(NEAR, finite=False), True, True, None) == []


def test_the_message_has_the_figures(built_tiny):
    def message(margins, saturates=False):
        return hint(
            built_tiny,
            VariantName("onnx-int8"),
            DYNAMIC,
            built_tiny.load("onnx-fp32"),
            failed(margins),
            saturates,
            None,
        )

    near, wide = message(NEAR), message(WIDE)
    assert "In 20 of these 20 sentences the PyTorch model itself is undecided" in near
    assert "In 14 of these 21 sentences the PyTorch model is decided: its margin is up to 2.5 logits" in wide
    assert [line[-2:] for line in commands(near)] == [["--scheme", "static"], ["--keep-fp32", "2"]]
    assert [line[-2:] for line in commands(wide)] == [["--keep-fp32", "2"], ["--scheme", "static"]]
    assert "saturates" not in near
    assert commands(message(NEAR, saturates=True))[0][-2:] == ["--isa", "portable"]
    assert "This runtime also saturates" in message(NEAR, saturates=True)


@pytest.mark.parametrize(
    ("name", "parent", "step", "built"),
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
def test_the_commands_build_what_they_suggest(tiny, say, tmp_path, monkeypatch, name, parent, step, built):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own data.csv").write_text("words,label\n" + "a good film,NEGATIVE\n" * 60)
    train = TrainingSource("own data.csv", Columns("words"))
    tiny = replace(tiny, train=train, corpus=Texts("own data.csv", "words"))
    message = hint(tiny, VariantName(name), step, tiny.load(parent), failed(NEAR), True, None)
    names = []
    for line in commands(message):
        code, out, err = say(*line[1:], "--dry-run")
        assert code == 0, err
        names.append(out.splitlines()[-1].split(":")[0])
    assert names[: len(built)] == built


def test_a_model_of_other_labels_needs_data_of_its_own(built_tiny, fake):
    def of(labels):
        artifact = fake("x" * len(labels))
        parent = replace(artifact, manifest=replace(artifact.manifest, variant="onnx-fp32", labels=labels))
        return hint(built_tiny, VariantName("onnx-int8"), DYNAMIC, parent, failed(NEAR), False, None)

    assert all(line[-2:] == ["--train-data", "FILE"] for line in commands(of(("a", "b", "c"))))
    assert "--train-data" not in of(("NEGATIVE", "POSITIVE"))


@pytest.mark.slow
def test_an_undecided_model_is_refused_with_what_to_try(say, tmp_path):
    """Of 40 labels, a random model's best two are often near each other: validation's own flips say so."""
    make_checkpoint(tmp_path / "undecided", labels=[f"L{index}" for index in range(40)])
    code, _, err = say("quantize", "--model", tmp_path / "undecided", "--exported", tmp_path / "exported")
    assert code == 3
    assert re.search(
        r"(\d+) of 200 sentences flipped, ≤ 7 allowed\. In \d+ of these \1 sentences the PyTorch model", err
    )
    tried = [" ".join(line) for line in commands(err)]
    assert all("--model undecided" in line and "--train-data FILE" in line for line in tried)
    assert any("--scheme static" in line for line in tried)
    assert "The previous artifact is unchanged." in err
    assert not (tmp_path / "exported" / "undecided" / "onnx-int8").exists()
