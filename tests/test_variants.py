"""Names and the table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain import variants
from toolchain.errors import ArtifactError, UnknownVariantError
from toolchain.variants import Export, Import, Optimize, Quantize, VariantName, parse_name

names = st.builds(VariantName, st.sampled_from(variants.RUNTIMES), st.booleans(), st.sampled_from(variants.SCHEMES))


@given(names)
def test_a_name_is_read_back_as_it_was_written(name):
    assert parse_name(str(name)) == name
    assert str(parse_name(str(name))) == str(name)


@given(names, names)
def test_two_variants_never_share_a_name(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    "text", ["", "onnx", "onnx-std-fp32", "onnx-fp32-std", "tf-fp32", "onnx-int9", "onnx-int8 ", "ONNX-int8"]
)
def test_only_one_spelling_is_a_name(text):
    with pytest.raises(UnknownVariantError):
        parse_name(text)


def test_every_variant_of_the_table_has_a_name_of_the_grammar_and_a_parent_before_it():
    seen = []
    for name, variant in variants.TABLE.items():
        assert str(parse_name(name)) == name == variant.name
        assert variant.parent in [None, *seen]
        assert variant.providers
        seen.append(name)


def test_lineage_starts_at_the_root():
    assert [v.name for v in variants.lineage("onnx-int8")] == ["torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"]


def test_an_unknown_variant_is_told_the_nearest():
    with pytest.raises(UnknownVariantError, match="Did you mean onnx-int8"):
        variants.get("onnx-int")
    with pytest.raises(UnknownVariantError, match="There are: torch-fp32"):
        variants.get("zzz")


def test_child_finds_the_variant_a_step_makes():
    assert variants.child("onnx-fp32", Quantize()).name == "onnx-int8"
    assert variants.child("onnx-std", Optimize()).name == "onnx-fp32"
    with pytest.raises(UnknownVariantError, match=r"Nothing is made from onnx-std by quantize. It takes: onnx-fp32"):
        variants.child("onnx-std", Quantize())


@pytest.mark.parametrize("step", [Import("abc"), Export(17), Optimize("cpu", ("fuse",)), Quantize()])
def test_a_step_survives_its_manifest(step):
    assert variants.step_from(variants.step_name(step), variants.settings_of(step)) == step


def test_a_step_of_another_release_is_refused_in_words():
    with pytest.raises(ArtifactError, match="does not know"):
        variants.step_from("export", {"flavour": 1})
    with pytest.raises(ArtifactError, match="does not know"):
        variants.step_from("distil", {})
