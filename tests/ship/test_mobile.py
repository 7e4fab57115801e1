"""Tests of bundles for phones: both file formats, the releases of ONNX Runtime that read them, and refusals."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import run_toolchain
from onnx import TensorProto, helper
from test_ship import create_at, make, reseal

from toolchain.artifacts.manifest import MANIFEST
from toolchain.artifacts.steps import Export, Optimize
from toolchain.artifacts.store import list_files, sha256
from toolchain.backends import Place, open_session
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.errors import ArtifactError, ShippingError, VerdictError
from toolchain.ship import shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.targets import mobile, ort_format
from toolchain.ship.targets.releases import (
    FIRST_KERNELS,
    OPERATORS,
    ORDER,
    RELEASES,
    Use,
    find_unsupported,
    oldest_supporting_release,
)

PRODUCTS = (b"DynamicQuantizeMatMul", b"QAttention")
NAMES = ("onnx-int8", "onnx-int8-portable", "onnx-fp32")
# All attention nodes of the variant `FULL_ATTENTION` have the operator Attention, which ONNX Runtime 1.16 supports.
FULL_ATTENTION = "onnx-fp32+no-first-query"
FEED = {"input_ids": np.arange(1000, 1025)[None], "attention_mask": np.ones((1, 25), np.int64)}


def ship(workspace, output, *names, **order):
    return make(workspace, output, *names, target="mobile", **order)


@pytest.fixture(scope="module")
def phone_bundle(built_tiny, tmp_path_factory):
    """A bundle for phones with three variants. Tests must not change this bundle."""
    folder = tmp_path_factory.mktemp("phone") / "bundle"
    ship(built_tiny, folder, *NAMES)
    return folder


@pytest.fixture
def bundle(phone_bundle, tmp_path):
    """A copy of the bundle for phones, which a test may change."""
    return shutil.copytree(phone_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def opset_20_workspace(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint's variants, exported with an operator set that includes Gelu."""
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path_factory.mktemp("opset-20"))
    chain = {"onnx-std": Export(20), FULL_ATTENTION: Optimize(passes=("fuse", "residual-sum", "first-token"))}
    ensure(workspace, ["onnx-int8", FULL_ATTENTION], chain, lambda line: None)
    return workspace


def logits_of(path, feed=FEED):
    session = open_session(path, "onnx", Place("cpu", 1))
    return session.run(feed)


def one_node(node, *, domain="", opset=18, ir_version=8, weights=()):
    """Returns a model of one node, with float input x and output y of shape [2], and with initializers `weights`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], list(weights))
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


@pytest.mark.slow
def test_a_phone_bundle_has_both_formats_and_the_files_for_a_reduced_build(phone_bundle, built_tiny):
    body = json.loads((phone_bundle / "bundle.json").read_text())
    assert body["ort_mobile"] == "1.17"
    listed_paths = {entry["path"] for entry in body["files"]}
    for model in body["models"]:
        assert {model["file"], model["ort"]["file"]} <= listed_paths
        assert sha256(phone_bundle / model["file"]) == sha256(built_tiny.path(model["variant"]) / "model.onnx")
        assert model["ort"]["bytes"] == (phone_bundle / model["ort"]["file"]).stat().st_size
        assert model["ort"]["format"] == 6
        # ONNX Runtime 1.17 is the first release whose MultiHeadAttention has all attributes that these models use.
        assert model["oldest_release"] == "1.17"
        assert (logits_of(phone_bundle / model["ort"]["file"]) == logits_of(phone_bundle / model["file"])).all()
    operators_text = (phone_bundle / "required_operators.config").read_text()
    types_text = (phone_bundle / "required_operators_and_types.config").read_text()
    assert operators_text.splitlines()[:4] == [
        "# Generated from model/s:",
        *sorted(f"# - {name}.ort" for name in NAMES),
    ]
    assert re.search(r"^com\.microsoft;1;.*DynamicQuantizeMatMul.*MultiHeadAttention", operators_text, re.MULTILINE)
    assert '"int8_t"' in types_text
    assert '"int8_t"' not in operators_text


@pytest.mark.slow
def test_both_formats_can_be_verified_with_and_without_this_package(phone_bundle):
    report = shipping.verify(phone_bundle)
    assert set(report["models"]) == {*NAMES, *(f"{name}.ort" for name in NAMES)}
    assert all(model_report["largest_delta"] < 1e-4 for model_report in report["models"].values())
    completed = subprocess.run(
        [sys.executable, "-I", phone_bundle / "verify.py"],
        capture_output=True,
        text=True,
        check=True,
        cwd=phone_bundle.parent,
    )
    assert completed.stdout.count("golden sentences passed") == 6
    assert "onnx-int8-portable.ort: golden" in completed.stdout


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(phone_bundle, built_tiny, tmp_path):
    """Compares the files of two equal bundles that two processes built.

    ONNX Runtime writes the kernel types of an .ort file in random order, so the toolchain sorts the kernel types.
    """
    model_options = ("--model", built_tiny.model, "--exported", built_tiny.exported)
    completed = run_toolchain(
        "ship", *NAMES, "--target", "mobile", "--output", tmp_path / "b", *model_options, cwd=tmp_path
    )
    assert completed.returncode == 0, completed.stderr
    first, second = (
        json.dumps(bundled.read_bundle(folder), indent=1).splitlines() for folder in (tmp_path / "b", phone_bundle)
    )
    assert first == second


@pytest.mark.slow
def test_custom_operators_of_this_process_do_not_change_the_file(phone_bundle, built_tiny, tmp_path):
    import onnxruntime
    import onnxruntime_extensions

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = onnxruntime.InferenceSession(str(phone_bundle / "onnx-fp32.onnx"), options)
    ort_format.save(phone_bundle / "onnx-fp32.onnx", tmp_path / "onnx-fp32.ort")
    assert session.get_inputs()
    assert (tmp_path / "onnx-fp32.ort").read_bytes() == (phone_bundle / "onnx-fp32.ort").read_bytes()


@pytest.mark.slow
def test_both_formats_can_contain_the_tokenizer(built_tiny, tmp_path):
    body = ship(built_tiny, tmp_path / "b", "onnx-int8", with_tokenizer=True)
    # ONNX Runtime 1.17 is the first release that reads opset 20, which added StringSplit.
    assert body["models"][0]["oldest_release"] == "1.17"
    report = shipping.verify(tmp_path / "b")
    assert set(report["models"]) == {"onnx-int8", "onnx-int8.ort"}
    assert all(model_report["largest_delta"] < 1e-4 for model_report in report["models"].values())
    readme = (tmp_path / "b" / "README.md").read_text()
    assert "registerCustomOpLibrary" in readme
    assert "OrtExt" in readme
    operators_text = (tmp_path / "b" / "required_operators.config").read_text()
    assert re.search(r"^ai\.onnx\.contrib;1;.*WordpieceTokenizer", operators_text, re.MULTILINE)
    with pytest.raises(ShippingError, match=r"StringSplit of a newer opset than 19"):
        ship(built_tiny, tmp_path / "old", "onnx-int8", with_tokenizer=True, ort_mobile="1.16")


@pytest.mark.slow
def test_sorting_changes_only_the_order_of_a_table(phone_bundle, tmp_path, monkeypatch):
    content = (phone_bundle / "onnx-int8.ort").read_bytes()
    sort_entries = ort_format._sort_entries
    monkeypatch.setattr(ort_format, "_sort_entries", lambda *arguments: sort_entries(*arguments)[::-1])
    reversed_content = ort_format._sort_kernel_types(content)
    monkeypatch.undo()
    assert reversed_content != content
    assert ort_format._sort_kernel_types(reversed_content) == content
    (tmp_path / "model.ort").write_bytes(reversed_content)
    assert (logits_of(tmp_path / "model.ort") == logits_of(phone_bundle / "onnx-int8.ort")).all()


@pytest.mark.slow
def test_shipping_the_same_again_changes_nothing(tiny, tmp_path):
    events = []
    ship(tiny, tmp_path / "b", "onnx-int8")
    inode = (tmp_path / "b").stat().st_ino
    ship(tiny, tmp_path / "b", "onnx-int8", say=lambda event: events.append(str(event)))
    assert events[-1].endswith("an equal bundle exists and stays unchanged")
    assert (tmp_path / "b").stat().st_ino == inode


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.16", "1.18"])
@pytest.mark.parametrize("name", ["onnx-std", FULL_ATTENTION])
def test_a_bundle_has_the_operator_set_of_its_release(opset_20_workspace, tmp_path, name, release):
    (model,) = ship(opset_20_workspace, tmp_path / "b", name, ort_mobile=release)["models"]
    assert (model["opset"][""], model["ir_version"]) == (min(RELEASES[release].opset, 20), 9)
    assert ("Gelu" in model["operators"]) == (release == "1.18")
    for file in (model["file"], model["ort"]["file"]):
        assert np.abs(logits_of(tmp_path / "b" / file) - logits_of(opset_20_workspace.path(name))).max() < 1e-5


def test_lower_converts_a_changed_operator(tmp_path):
    """Opset 19 added the attribute `saturate` to Cast."""
    onnx.save(one_node(helper.make_node("Cast", ["x"], ["y"], to=1), opset=20), tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.15")
    model = onnx.load(tmp_path / "old.onnx")
    assert model.opset_import[0].version == 18
    onnx.checker.check_model(model)


def test_lower_changes_only_the_ir_version_where_that_is_enough(built_tiny, tmp_path):
    model = onnx.load(built_tiny.path("onnx-int8") / "model.onnx")
    model.ir_version = 11
    onnx.save(model, tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.17")
    lowered_model = onnx.load(tmp_path / "old.onnx")
    assert lowered_model.ir_version == 9
    assert (lowered_model.graph, lowered_model.opset_import) == (model.graph, model.opset_import)


def test_lower_removes_an_operator_set_that_no_node_uses(built_tiny, tmp_path):
    model = onnx.load(built_tiny.path("onnx-int8") / "model.onnx")
    opsets = sorted((entry.domain, entry.version) for entry in model.opset_import)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    onnx.save(model, tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.17")
    lowered_model = onnx.load(tmp_path / "old.onnx")
    assert sorted((entry.domain, entry.version) for entry in lowered_model.opset_import) == opsets
    assert lowered_model.graph == model.graph


INT4 = helper.make_tensor("w", TensorProto.INT4, [2], [1, 2])
UNREADABLE = {
    "a type of a later IR version": (
        one_node(helper.make_node("DequantizeLinear", ["w", "x"], ["y"]), opset=21, ir_version=10, weights=[INT4]),
        r"tensors of type INT4, which need IR version 10\. ONNX Runtime 1\.17 .* up to 9\. .*1\.18 or newer",
    ),
    "an operator that the onnx package cannot fully convert to an older opset": (
        one_node(helper.make_node("Cast", ["x"], ["y"], to=1, saturate=0), opset=20),
        r"uses Cast of a newer opset than 18.*--opset 18",
    ),
    "an operator that older operators cannot replace": (
        one_node(helper.make_node("TensorScatter", ["x", "x"], ["y"]), opset=24),
        r"uses TensorScatter of a newer opset than 20.*--opset 18",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_lower_refuses_a_model_that_the_release_cannot_read(tmp_path, case):
    model, message = UNREADABLE[case]
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ShippingError, match=message):
        mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.15" if "fully" in case else "1.17")
    assert not (tmp_path / "old.onnx").exists()


def test_lower_refuses_a_later_version_of_onnx_runtimes_operators(built_tiny, tmp_path):
    model = onnx.load(built_tiny.path("onnx-int8") / "model.onnx")
    next(entry for entry in model.opset_import if entry.domain).version = 2
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ShippingError, match=r"opset 2 of com\.microsoft"):
        mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.17")


REFUSED = {
    ("onnx-fp32", "1.16"): r"MultiHeadAttention with unidirectional \(from 1\.17 on\).*--ort-mobile 1\.17 or newer",
    ("onnx-int8", "1.16"): r"MultiHeadAttention with unidirectional \(from 1\.17 on\).*--ort-mobile 1\.17 or newer",
    ("onnx-fp32", "1.15"): r"reads version 5 of the ORT format.*--ort-mobile 1\.16 or newer",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "release"), REFUSED)
def test_a_variant_that_needs_a_later_release_is_refused(built_tiny, tmp_path, name, release):
    with pytest.raises(ShippingError, match=REFUSED[name, release]):
        ship(built_tiny, tmp_path / "b", name, ort_mobile=release)
    assert not (tmp_path / "b").exists()


def mask_by_key_padding(artifact):
    """Replaces the bias of the last attention node by a key_padding_mask, as earlier releases of the toolchain did."""
    model = onnx.load(artifact.onnx_path)
    (full_attention,) = (node for node in model.graph.node if node.op_type == "Attention")
    (last_attention,) = (node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    last_attention.input[:] = [*last_attention.input[:3], "", full_attention.input[3]]
    onnx.save(model, artifact.onnx_path)
    manifest = dataclasses.replace(artifact.manifest, files=list_files(artifact.path))
    (artifact.path / MANIFEST).write_text(manifest.to_json())


@pytest.mark.slow
def test_a_release_that_computes_padded_batches_wrongly_is_refused(tiny, tmp_path, say):
    mask_by_key_padding(tiny.load("onnx-fp32"))
    options = ("--model", tiny.model, "--exported", tiny.exported, "--output", tmp_path / "b")
    code, out, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", "1.20", *options)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "Error: onnx-fp32 uses MultiHeadAttention with key_padding_mask longer than the query (correct from 1.21 on), "
        "but ONNX Runtime 1.20 refuses padded batches with such attention, or computes them incorrectly. Ship a "
        "variant with standard operators of opset 18, such as onnx-std. Or ship onnx-fp32 with --ort-mobile 1.21 or "
        "newer. [E-SHIPPING]"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]
    (model,) = ship(tiny, tmp_path / "b", "onnx-fp32", ort_mobile="1.21")["models"]
    assert model["oldest_release"] == "1.21"


@pytest.mark.slow
def test_a_new_operator_after_an_operator_of_onnx_runtime_is_refused(opset_20_workspace, tmp_path):
    """Checks that `ship` refuses a Gelu operator whose input type the onnx package does not know.

    ONNX Runtime 1.16 reads opset 19, which has no Gelu. So the onnx package must replace Gelu by older operators, and
    needs the type of Gelu's input. In this model, the input of Gelu is the result of an int8 product. ONNX Runtime
    defines the operator of the int8 product, so the onnx package does not know the type of the result.
    """
    with pytest.raises(ShippingError, match=r"onnx-int8 uses Gelu of a newer opset than 19.*--opset 18"):
        ship(opset_20_workspace, tmp_path / "b", "onnx-int8", ort_mobile="1.16")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_release_without_a_kernel_of_the_operator_set_is_refused(opset_20_workspace, tmp_path):
    """ONNX Runtime 1.17 has no kernel for Gelu, so it cannot run Gelu in an .ort file.

    In an .onnx file, ONNX Runtime 1.17 replaces Gelu by the function definition of Gelu.
    """
    with pytest.raises(ShippingError, match=r"onnx-std uses Gelu \(from 1\.18 on\), which ONNX Runtime 1\.17 lacks"):
        ship(opset_20_workspace, tmp_path / "b", "onnx-std", ort_mobile="1.17")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_4_bit_operator_needs_a_release_that_has_it(tmp_path):
    sizes = {"K": 32, "N": 2, "bits": 4, "block_size": 32}
    weight = helper.make_tensor("w", TensorProto.UINT8, [2, 1, 16], bytes(32), raw=True)
    scale = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 1.0])
    model = one_node(
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **sizes),
        domain="com.microsoft",
        weights=[weight, scale],
    )
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in (1, 32):
        model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = size
    model.graph.output[0].type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_value=1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ShippingError, match=r"MatMulNBits with weight_prepacked \(from 1\.28 on\)"):
        mobile.make(tmp_path / "model.onnx", tmp_path / "b.onnx", "1.27", tmp_path / "model.onnx")
    assert (
        mobile.make(tmp_path / "model.onnx", tmp_path / "b.onnx", "1.28", tmp_path / "model.onnx")["oldest_release"]
        == "1.28"
    )


def test_the_table_of_releases_tells_which_release_supports_an_operator():
    gather, bits = Use("com.microsoft", "GatherBlockQuantized"), Use("com.microsoft", "GatherBlockQuantized", "bits")
    # If a release of ONNX Runtime lacks an operator, `find_unsupported` does not list the operator's attributes.
    assert find_unsupported("1.19", [gather, bits]) == [gather]
    assert find_unsupported("1.22", [gather, bits]) == [bits]
    assert find_unsupported("1.23", [gather, bits]) == []
    assert oldest_supporting_release([gather, bits, Use("", "Add")]) == "1.23"
    assert oldest_supporting_release([]) == ORDER[0]
    unknown_uses = [
        Use("com.microsoft", "GroupQueryAttention"),
        Use("com.microsoft", "Gelu", "tomorrow"),
        Use("com.microsoft.nchwc", "Conv"),
    ]
    assert find_unsupported(ORDER[-1], unknown_uses) == sorted(unknown_uses)
    assert oldest_supporting_release([gather, *unknown_uses]) is None
    assert "in no known release" in str(unknown_uses[0])
    assert find_unsupported("1.17", [Use("com.microsoft", "MatMulNBits", "input 3")]) == []
    assert find_unsupported("1.17", [Use("com.microsoft", "MatMulNBits", "input 5")]) != []
    assert sorted(ORDER, key=lambda release: int(release.split(".")[1])) == ORDER
    limits = [
        (release_limits.ir_version, release_limits.opset, release_limits.ort_format)
        for release_limits in RELEASES.values()
    ]
    assert limits == sorted(limits)
    assert {release for by_release in OPERATORS.values() for release in by_release} <= set(ORDER)


def test_the_table_of_operators_matches_the_installed_runtime():
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    installed_release = ".".join(onnxruntime.__version__.split(".")[:2])
    if installed_release not in RELEASES:
        pytest.skip(f"ONNX Runtime {installed_release} is not in the table of releases")
    schemas = {s.name: s for s in state.get_all_operator_schema() if s.domain == "com.microsoft"}
    kernels = {k.op_name for k in state.get_all_opkernel_def() if "CPU" in k.provider and k.domain == "com.microsoft"}
    for operator, by_release in OPERATORS.items():
        known_attributes = {name for names in by_release.values() for name in names if not name.startswith("input ")}
        if not find_unsupported(installed_release, [Use("com.microsoft", operator)]):
            assert operator in kernels
            assert set(schemas[operator].attributes) <= known_attributes or installed_release != ORDER[-1], operator
    standard_kernels = {k.op_name for k in state.get_all_opkernel_def() if "CPU" in k.provider and not k.domain}
    assert standard_kernels >= {
        operator for operator in FIRST_KERNELS if not find_unsupported(installed_release, [Use("", operator)])
    }


def test_the_table_has_the_limits_of_the_installed_runtime(tmp_path):
    import onnxruntime

    installed_release = ".".join(onnxruntime.__version__.split(".")[:2])
    if installed_release not in RELEASES:
        pytest.skip(f"ONNX Runtime {installed_release} is not in the table of releases")
    limit, node = RELEASES[installed_release], helper.make_node("Identity", ["x"], ["y"])

    def is_readable(**versions):
        onnx.save(one_node(node, **versions), tmp_path / "model.onnx")
        try:
            onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime has a different exception class for each status
            return False
        return True

    assert is_readable(ir_version=limit.ir_version, opset=limit.opset)
    assert not is_readable(ir_version=limit.ir_version + 1)
    assert not is_readable(opset=limit.opset + 1)


@pytest.mark.slow
def test_an_operator_without_a_cpu_kernel_is_refused(tmp_path):
    node = helper.make_node("BiasSoftmax", ["x", "x"], ["y"], domain="com.microsoft", axis=0, is_inner_broadcast=0)
    onnx.save(one_node(node, domain="com.microsoft"), tmp_path / "model.onnx")
    with pytest.raises(ShippingError, match=r"model\.onnx cannot be saved in ORT format: .*BiasSoftmax"):
        ort_format.save(tmp_path / "model.onnx", tmp_path / "model.ort")


@pytest.mark.slow
def test_changed_logits_raise_a_verdict_error(tiny, tmp_path, monkeypatch):
    def lower_wrongly(source, target, release):
        model = onnx.load(source)
        bias = next(i for i in model.graph.initializer if i.name.endswith("classifier.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(3e-4), bias.name))
        onnx.save(model, target)

    monkeypatch.setattr(mobile, "lower", lower_wrongly)
    with pytest.raises(
        VerdictError, match=r"logits of onnx-fp32\.onnx differ from the logits of onnx-fp32: largest .* 0\.0003"
    ):
        ship(tiny, tmp_path / "b", "onnx-fp32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported"]


@pytest.mark.parametrize("kind", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_shipping_does_not_overwrite_existing_files(tiny, tmp_path, kind):
    create_at(tmp_path / "b", kind)
    with pytest.raises(ArtifactError, match=str(tmp_path / "b")):
        ship(tiny, tmp_path / "b", "onnx-int8")


@pytest.mark.parametrize("name", ["torch-fp32", "bnb-nf4"])
def test_a_pytorch_variant_is_not_shipped(built_tiny, tmp_path, name):
    with pytest.raises(ShippingError, match=r"no \.onnx file"):
        ship(built_tiny, tmp_path / "b", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ship_for_mobile_and_its_usage_errors(tiny, say):
    model_options = ("--model", tiny.model, "--exported", tiny.exported)
    folder = tiny.exported / tiny.model / "bundle-mobile"
    code, out, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", "1.20", *model_options)
    assert (code, out.splitlines()[0]) == (0, str(folder)), err
    assert "onnx-fp32.ort: largest |Δlogit| 0 " in err
    assert "onnx-fp32.ort: largest" in say("verify", folder)[1]
    for wrong_release in ("1.14", "1.17.3", "new", ""):
        code, _, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", wrong_release, *model_options)
        assert code == 2
        assert all(f"'{release}'" in err for release in RELEASES), err
    code, _, err = say("ship", "onnx-fp32", "--target", "web", "--ort-mobile", "1.17", *model_options)
    assert code == 2
    assert "--ort-mobile needs --target mobile" in err


@pytest.mark.slow
def test_weights_in_ort_format_are_unsigned_where_products_can_saturate(phone_bundle):
    """Checks that weights in ORT format are unsigned in `onnx-int8`, and signed in `onnx-int8-portable`.

    Products with signed 8-bit weights can saturate on x86 processors without VNNI. For .onnx files, a session option
    prevents saturation. For files in ORT format, the session option has no effect. So the toolchain stores unsigned
    8-bit weights in files in ORT format, because products with unsigned weights never saturate. Portable weights stay
    signed: they have 7 bits, so their products never saturate.
    """
    for name, is_signed in (("onnx-int8", False), ("onnx-int8-portable", True)):
        content = ort_format.read_root((phone_bundle / f"{name}.ort").read_bytes()).Model().Graph()
        types = {
            content.Initializers(index).Name().decode(): content.Initializers(index).DataType()
            for index in range(content.InitializersLength())
        }
        products = [node for node in map(content.Nodes, range(content.NodesLength())) if node.OpType() in PRODUCTS]
        assert products
        weights = {types[node.Inputs(1).decode()] for node in products}
        assert weights == {TensorProto.INT8 if is_signed else TensorProto.UINT8}, name


@pytest.mark.slow
def test_a_phone_bundle_states_where_its_models_are_exact(phone_bundle):
    int8, portable, fp32 = json.loads((phone_bundle / "bundle.json").read_text())["models"]
    assert "64-bit ARM" in int8["exact_on"]
    assert portable["exact_on"] == fp32["exact_on"] == "any processor"
    readme = (phone_bundle / "README.md").read_text()
    assert "The `.ort` files are exact on every processor" in readme
    assert '`options.addConfigEntry("session.x64quantprecision", "1")`' in readme


@pytest.mark.slow
def test_the_readme_of_a_phone_bundle_has_the_findings_of_the_checker(phone_bundle):
    readme = (phone_bundle / "README.md").read_text()
    assert "nothing was measured on a phone" in readme
    for model in json.loads((phone_bundle / "bundle.json").read_text())["models"]:
        assert [(provider["provider"], provider["fixed_shapes"]) for provider in model["providers"]] == [
            (name, has_fixed_shapes)
            for has_fixed_shapes in (False, True)
            for name in ("NNAPI", "CoreML, neural network", "CoreML, ML program")
        ]
        for provider in model["providers"]:
            assert 0 < provider["taken"] < provider["nodes"]
            assert provider["worth_trying"] in ("yes", "maybe", "no")
            shapes = "fixed" if provider["fixed_shapes"] else "dynamic"
            row = (model["variant"], provider["provider"], shapes, f"{provider['taken']} of {provider['nodes']}")
            assert f"| {' | '.join(row)} | {provider['partitions']} | {provider['worth_trying']} |" in readme


@pytest.mark.slow
def test_the_code_of_the_readme_uses_names_of_the_bundle(phone_bundle):
    readme = (phone_bundle / "README.md").read_text()
    body = json.loads((phone_bundle / "bundle.json").read_text())
    kotlin, swift = (
        "".join(re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)) for language in ("kotlin", "swift")
    )
    assert f'assets.open("{body["models"][0]["ort"]["file"]}")' in kotlin
    assert 'forResource: "onnx-int8", withExtension: "ort"' in swift
    for code in (kotlin, swift):
        assert all(f'"{spec["name"]}"' in code for model in body["models"] for spec in model["inputs"])
        assert {"labels", "multi_label"} <= set(re.findall(r"\w+", code)) & set(body)
    assert f'"{body["models"][0]["outputs"][0]["name"]}"' in swift
    assert "onnxruntime-android:1.17.+" in readme


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_finds_one_changed_byte_in_ort_format(bundle, place):
    content = bytearray((bundle / "onnx-int8.ort").read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]] ^= 1
    (bundle / "onnx-int8.ort").write_bytes(content)
    with pytest.raises(VerdictError, match=r"onnx-int8\.ort"):
        shipping.verify(bundle)
    assert bundled.main(bundle) == 3


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another model", "no model", "unlisted"])
def test_verify_finds_another_model_in_ort_format(bundle, change):
    if change == "unlisted":
        reseal(bundle, lambda body: body["models"][0]["ort"].update(file="../onnx-int8.ort"))
    else:
        content = (bundle / "onnx-fp32.ort").read_bytes() if change == "another model" else b"none"
        (bundle / "onnx-int8.ort").write_bytes(content)
        entry = {"bytes": len(content), "sha256": sha256(bundle / "onnx-int8.ort")}
        reseal(bundle, lambda body: next(e for e in body["files"] if e["path"] == "onnx-int8.ort").update(entry))
    reason = r"onnx-int8\.ort(: the .* from the recorded logits| cannot be loaded)|is not listed"
    with pytest.raises(VerdictError, match=reason):
        shipping.verify(bundle)
