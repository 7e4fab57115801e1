"""Tests of variant names, and of the parents and steps that the names determine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.artifacts import names as grammar
from toolchain.artifacts import variants
from toolchain.artifacts.names import Parts, VariantName
from toolchain.artifacts.steps import (
    Export,
    Import,
    Optimize,
    Prune,
    Quantize,
    Recover,
    decode_step,
    settings_of,
    step_name,
)
from toolchain.errors import ArtifactError, SettingsError, UnknownVariantError

pruned_tags = st.builds(
    dict, pruned=st.integers(1, 99), recovered=st.integers(0, 12), method=st.sampled_from(grammar.METHODS)
)
names = st.builds(
    lambda runtime, std, webgpu, tags, scheme, portable, static, label: Parts(
        runtime, std, webgpu, scheme=scheme, portable=portable, static=static, label=label, **tags
    ),
    st.sampled_from(grammar.RUNTIMES),
    st.booleans(),
    st.booleans(),
    st.one_of(st.just({}), pruned_tags),
    st.sampled_from(grammar.SCHEMES),
    st.booleans(),
    st.booleans(),
    st.one_of(st.just(""), st.from_regex(grammar.LABEL, fullmatch=True)),
)


@given(names)
def test_a_name_can_be_written_and_parsed_back(name):
    assert VariantName(str(name)).parts == name
    assert VariantName(name) == str(name)


@given(names, names)
def test_two_variants_never_share_a_name(left, right):
    assert (str(left) == str(right)) == (left == right)


@pytest.mark.parametrize(
    "text", ["", "onnx", "onnx-std-fp32", "onnx-fp32-std", "tf-fp32", "onnx-int9", "onnx-int8 ", "ONNX-int8"]
)
def test_a_wrong_spelling_of_a_name_is_refused(text):
    with pytest.raises(UnknownVariantError):
        VariantName(text)


def test_every_default_cell_has_a_lineage_and_runs_on_its_provider():
    for provider, cells in variants.DEFAULT_CELLS.items():
        for name in cells:
            assert provider in variants.get(name).providers
            assert variants.lineage(name)[0].step == Import()


@given(names)
def test_the_step_of_a_variant_builds_it_from_its_parent(name):
    try:
        variant = variants.get(str(name))
    except UnknownVariantError:
        return
    if variant.parent is not None:
        assert variants.derive_variant(variant.parent, variant.step, name.label) == variant
    assert next(v.name for v in variants.lineage(variant.name)) == "torch-fp32"


def test_lineage_starts_at_the_root():
    assert [v.name for v in variants.lineage("onnx-int8")] == ["torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"]
    assert [v.name for v in variants.lineage("onnx-pruned50-r1-int8")] == [
        "torch-fp32",
        "torch-pruned50",
        "torch-pruned50-r1",
        "onnx-std-pruned50-r1",
        "onnx-pruned50-r1",
        "onnx-pruned50-r1-int8",
    ]


def test_an_unknown_variant_gives_an_error_with_the_nearest_name():
    with pytest.raises(UnknownVariantError, match="Did you mean onnx-int8"):
        variants.get("onnx-int")
    with pytest.raises(UnknownVariantError, match="Variants: torch-fp32"):
        variants.get("zzz")


def test_child_returns_the_variant_that_a_step_builds():
    assert variants.derive_variant("onnx-fp32", Quantize()).name == "onnx-int8"
    assert variants.derive_variant("onnx-std", Optimize()).name == "onnx-fp32"
    assert variants.derive_variant("torch-fp32", Prune(0.3, "magnitude")).name == "torch-pruned30-magnitude"
    assert variants.derive_variant("onnx-std", Quantize()).name == "onnx-std-int8"
    assert variants.derive_variant("onnx-pruned50", Quantize(reduce_range=True)).name == "onnx-pruned50-int8-portable"
    assert variants.derive_variant("onnx-pruned50", Quantize(scheme="static")).name == "onnx-pruned50-int8-static"
    assert variants.derive_variant("onnx-std", Quantize(scheme="static")).name == "onnx-std-int8-static"
    assert not variants.is_variant("onnx-int8-portable-static")
    assert not variants.is_variant("onnx-int4-static")
    with pytest.raises(
        UnknownVariantError, match=r"The step quantize cannot build a variant from onnx-int8\. .* takes an fp32 graph"
    ):
        variants.derive_variant("onnx-int8", Quantize())
    with pytest.raises(UnknownVariantError, match="prune torch-fp32 at a higher ratio"):
        variants.derive_variant("torch-pruned30", Prune(0.5))
    with pytest.raises(UnknownVariantError, match="takes a pruned PyTorch"):
        variants.derive_variant("torch-fp32", Recover(1))
    with pytest.raises(UnknownVariantError):  # recovery would change the weights that the method `mask` sets to zero
        variants.derive_variant("torch-pruned30-mask", Recover(1))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Quantize, {"scheme": "nf4"}),
        (Quantize, {"scheme": "fp16"}),  # `Optimize` builds fp16
        (Quantize, {"backend": "torch", "scheme": "dynamic"}),
        (Quantize, {"backend": "torch", "scheme": "int8", "reduce_range": True}),
        (Quantize, {"scheme": "int4", "reduce_range": True}),
        (Quantize, {"scheme": "static", "reduce_range": True}),
        (Quantize, {"backend": "bnb", "scheme": "nf4", "embeddings": "int8"}),
        (Quantize, {"backend": "torch", "scheme": "int8", "keep_fp32": 1}),
        (Quantize, {"backend": "torchao", "scheme": "dynamic"}),
        (Quantize, {"backend": "torchao", "scheme": "int8", "reduce_range": True}),
        (Quantize, {"backend": "torch", "scheme": "int8", "trim_vocab": "train"}),
        (Quantize, {"passes": ("smooth", "quantize-linear")}),
        (Quantize, {"passes": ()}),
        (Quantize, {"passes": ("quantize-linear",), "embeddings": "int4"}),
        (Quantize, {"passes": ("quantize-embedding",), "keep_fp32": 1}),
        (Quantize, {"passes": ("quantize-embedding",), "reduce_range": True}),
        (Quantize, {"scheme": "static", "passes": ("quantize-embedding",)}),
        (Prune, {"ratio": 0.0}),
        (Prune, {"ratio": 1.0}),
        (Prune, {"ratio": 0.333}),
        (Prune, {"ratio": float("nan")}),
        (Prune, {"ratio": 0.5, "method": "mask", "layers": 3}),
        (Prune, {"ratio": 0.5, "method": "mask", "cost": "latency"}),
    ],
)
def test_settings_that_exclude_each_other_are_refused(kind, settings):
    with pytest.raises(SettingsError):
        kind(**settings)
    with pytest.raises(ArtifactError):
        decode_step(kind.__name__.lower(), settings)


def test_passes_without_leaves_out_the_named_passes():
    assert Quantize.passes_without("dynamic", []) is None
    assert Quantize.passes_without("dynamic", ["padding"]) == ("quantize-linear", "quantize-embedding")
    # without the pass quantize-linear, the pass smooth has no use
    assert Quantize.passes_without("static", ["quantize-linear"]) == ("quantize-embedding",)
    assert Quantize.passes_without("int4", ["quantize-linear", "quantize-embedding"]) == ()
    with pytest.raises(SettingsError, match="quantize-linear, quantize-embedding"):
        Quantize.passes_without("int4", ["padding"])


def test_variants_built_from_a_parent_keep_its_label():
    assert variants.derive_variant("onnx-fp32", Quantize(), "small").name == "onnx-int8+small"
    assert variants.derive_variant("torch-fp32", Prune(0.5), "fast").name == "torch-pruned50+fast"
    variant = variants.derive_variant("onnx-std-pruned50+fast", Optimize())
    assert (variant.name, variant.parent) == ("onnx-pruned50+fast", "onnx-std-pruned50+fast")
    with pytest.raises(UnknownVariantError, match="must start with fast"):
        variants.derive_variant("onnx-std-pruned50+fast", Optimize(), "other")
    for name in ("torch-fp32+mine", "onnx-int8+", "onnx-int8+A", "onnx-int8+a+b", "onnx-int8+-a", "onnx-int8+a--b"):
        assert not variants.is_variant(name)
    assert variants.get("onnx-int8+small").runtime == "onnx"


def test_unpruned_is_the_name_without_pruning_tags_and_label():
    assert VariantName("onnx-pruned50-int8+fast").unpruned_name == "onnx-int8"
    assert VariantName("onnx-pruned50-r1-magnitude-int8").unpruned_name == "onnx-int8"
    assert VariantName("torch-pruned30").unpruned_name == "torch-fp32"


@pytest.mark.parametrize(
    "step",
    [
        Import("abc"),
        Prune(0.3),
        Recover(2),
        Export(17, "torch"),
        Export(17, "optimum"),
        Optimize("cpu", ("fuse",)),
        Quantize(),
        Quantize(reduce_range=True),
        Quantize(passes=("quantize-linear",)),
    ],
)
def test_a_step_can_be_written_to_a_manifest_and_read_back(step):
    assert decode_step(step_name(step), settings_of(step)) == step


def test_a_manifest_leaves_out_settings_that_are_not_set():
    assert settings_of(Quantize()) == {"backend": "ort", "scheme": "dynamic"}
    assert settings_of(Quantize(reduce_range=True))["reduce_range"] is True


def test_an_unknown_step_or_setting_raises_an_artifact_error():
    with pytest.raises(ArtifactError, match="does not know"):
        decode_step("export", {"flavour": 1})
    with pytest.raises(ArtifactError, match="does not know"):
        decode_step("distil", {})
