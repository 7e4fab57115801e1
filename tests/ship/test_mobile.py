"""Bundles for phones: both formats, the releases of ONNX Runtime that read them, and refusals."""

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
from test_ship import lies_there, make, reseal

from toolchain.artifacts.manifest import MANIFEST
from toolchain.artifacts.steps import Export, Optimize
from toolchain.artifacts.store import list_files, sha256
from toolchain.backends import Place, open_session
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
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
OLD = "onnx-fp32+no-first-query"  # has Attention alone, which ONNX Runtime 1.16 reads
FEED = {"input_ids": np.arange(1000, 1025)[None], "attention_mask": np.ones((1, 25), np.int64)}


def ship(workspace, output, *names, **order):
    return make(workspace, output, *names, target="mobile", **order)


@pytest.fixture(scope="module")
def phone(built_tiny, tmp_path_factory):
    """A bundle for phones of three variants; not to be changed."""
    folder = tmp_path_factory.mktemp("phone") / "bundle"
    ship(built_tiny, folder, *NAMES)
    return folder


@pytest.fixture
def bundle(phone, tmp_path):
    """A copy of `phone`; a test may change it."""
    return shutil.copytree(phone, tmp_path / "bundle")


@pytest.fixture(scope="module")
def of_opset_20(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint's variants, exported with an operator set that has Gelu."""
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path_factory.mktemp("opset-20"))
    chain = {"onnx-std": Export(20), OLD: Optimize(passes=("fuse", "residual-sum", "first-token"))}
    ensure(workspace, ["onnx-int8", OLD], chain, lambda line: None)
    return workspace


def answer(path, feed=FEED):
    session = open_session(path, "onnx", Place("cpu", 1))
    return session.run(feed)


def one_node(node, *, domain="", opset=18, ir_version=8, weights=()):
    """A model of a node that reads x, float [2], and the weights."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], list(weights))
    sets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=sets, ir_version=ir_version)


@pytest.mark.slow
def test_both_formats_and_what_a_reduced_build_needs_are_there(phone, built_tiny):
    body = json.loads((phone / "bundle.json").read_text())
    assert body["ort_mobile"] == "1.17"
    listed = {entry["path"] for entry in body["files"]}
    for model in body["models"]:
        assert {model["file"], model["ort"]["file"]} <= listed
        assert sha256(phone / model["file"]) == sha256(built_tiny.path(model["variant"]) / "model.onnx")
        assert model["ort"]["bytes"] == (phone / model["ort"]["file"]).stat().st_size
        assert model["ort"]["format"] == 6
        assert model["oldest_release"] == "1.17"  # whose MultiHeadAttention has all attributes it is saved with
        assert (answer(phone / model["ort"]["file"]) == answer(phone / model["file"])).all()
    plain = (phone / "required_operators.config").read_text()
    typed = (phone / "required_operators_and_types.config").read_text()
    assert plain.splitlines()[:4] == ["# Generated from model/s:", *sorted(f"# - {name}.ort" for name in NAMES)]
    assert re.search(r"^com\.microsoft;1;.*DynamicQuantizeMatMul.*MultiHeadAttention", plain, re.MULTILINE)
    assert '"int8_t"' in typed
    assert '"int8_t"' not in plain


@pytest.mark.slow
def test_both_formats_are_verified_here_and_without_this_package(phone):
    report = shipping.verify(phone)
    assert set(report["models"]) == {*NAMES, *(f"{name}.ort" for name in NAMES)}
    assert all(found["largest_delta"] < 1e-4 for found in report["models"].values())
    alone = subprocess.run(
        [sys.executable, "-I", phone / "verify.py"], capture_output=True, text=True, check=True, cwd=phone.parent
    )
    assert alone.stdout.count("golden sentences passed") == 6
    assert "onnx-int8-portable.ort: golden" in alone.stdout


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(phone, built_tiny, tmp_path):
    """Also in another process: ONNX Runtime alone writes one table in a random order."""
    where = ("--model", built_tiny.model, "--exported", built_tiny.exported)
    done = run_toolchain("ship", *NAMES, "--target", "mobile", "--output", tmp_path / "b", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.dumps(bundled.read_bundle(folder), indent=1).splitlines() for folder in (tmp_path / "b", phone))
    assert one == two


@pytest.mark.slow
def test_operators_this_process_has_loaded_leave_no_trace(phone, built_tiny, tmp_path):
    import onnxruntime
    import onnxruntime_extensions

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    answered = onnxruntime.InferenceSession(str(phone / "onnx-fp32.onnx"), options)
    ort_format.save(phone / "onnx-fp32.onnx", tmp_path / "onnx-fp32.ort")
    assert answered.get_inputs()
    assert (tmp_path / "onnx-fp32.ort").read_bytes() == (phone / "onnx-fp32.ort").read_bytes()


@pytest.mark.slow
def test_texts_in_both_formats(built_tiny, tmp_path):
    body = ship(built_tiny, tmp_path / "b", "onnx-int8", with_tokenizer=True)
    assert body["models"][0]["oldest_release"] == "1.17"  # whose opset has StringSplit
    report = shipping.verify(tmp_path / "b")
    assert set(report["models"]) == {"onnx-int8", "onnx-int8.ort"}
    assert all(found["largest_delta"] < 1e-4 for found in report["models"].values())
    readme = (tmp_path / "b" / "README.md").read_text()
    assert "registerCustomOpLibrary" in readme
    assert "OrtExt" in readme
    plain = (tmp_path / "b" / "required_operators.config").read_text()
    assert re.search(r"^ai\.onnx\.contrib;1;.*WordpieceTokenizer", plain, re.MULTILINE)
    with pytest.raises(ShippingError, match=r"StringSplit of a newer opset than 19"):
        ship(built_tiny, tmp_path / "old", "onnx-int8", with_tokenizer=True, ort_mobile="1.16")


@pytest.mark.slow
def test_the_order_of_a_table_is_all_that_is_changed(phone, tmp_path, monkeypatch):
    content = (phone / "onnx-int8.ort").read_bytes()
    forwards = ort_format._sort_entries
    monkeypatch.setattr(ort_format, "_sort_entries", lambda *which: forwards(*which)[::-1])
    backwards = ort_format._sort_kernel_types(content)
    monkeypatch.undo()
    assert backwards != content
    assert ort_format._sort_kernel_types(backwards) == content
    (tmp_path / "model.ort").write_bytes(backwards)
    assert (answer(tmp_path / "model.ort") == answer(phone / "onnx-int8.ort")).all()


@pytest.mark.slow
def test_shipping_again_changes_nothing(tiny, tmp_path):
    said = []
    ship(tiny, tmp_path / "b", "onnx-int8")
    before = (tmp_path / "b").stat().st_ino
    ship(tiny, tmp_path / "b", "onnx-int8", say=lambda event: said.append(str(event)))
    assert said[-1].endswith("an equal bundle exists, unchanged")
    assert (tmp_path / "b").stat().st_ino == before


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.16", "1.18"])
@pytest.mark.parametrize("name", ["onnx-std", OLD])
def test_an_operator_set_is_brought_down(of_opset_20, tmp_path, name, release):
    (model,) = ship(of_opset_20, tmp_path / "b", name, ort_mobile=release)["models"]
    assert (model["opset"][""], model["ir_version"]) == (min(RELEASES[release].opset, 20), 9)
    assert ("Gelu" in model["operators"]) == (release == "1.18")
    for file in (model["file"], model["ort"]["file"]):
        assert np.abs(answer(tmp_path / "b" / file) - answer(of_opset_20.path(name))).max() < 1e-5


def test_an_operator_whose_definition_changed_is_converted(tmp_path):
    """Opset 19 told Cast how to saturate."""
    onnx.save(one_node(helper.make_node("Cast", ["x"], ["y"], to=1), opset=20), tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.15")
    model = onnx.load(tmp_path / "old.onnx")
    assert model.opset_import[0].version == 18
    onnx.checker.check_model(model)


def test_an_ir_version_is_brought_down_and_nothing_else(built_tiny, tmp_path):
    model = onnx.load(built_tiny.path("onnx-int8") / "model.onnx")
    model.ir_version = 11
    onnx.save(model, tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.17")
    lowered = onnx.load(tmp_path / "old.onnx")
    assert lowered.ir_version == 9
    assert (lowered.graph, lowered.opset_import) == (model.graph, model.opset_import)


def test_an_operator_set_that_no_node_uses_is_left_out(built_tiny, tmp_path):
    model = onnx.load(built_tiny.path("onnx-int8") / "model.onnx")
    sets = sorted((entry.domain, entry.version) for entry in model.opset_import)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    onnx.save(model, tmp_path / "new.onnx")
    mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.17")
    lowered = onnx.load(tmp_path / "old.onnx")
    assert sorted((entry.domain, entry.version) for entry in lowered.opset_import) == sets
    assert lowered.graph == model.graph


INT4 = helper.make_tensor("w", TensorProto.INT4, [2], [1, 2])
UNREADABLE = {
    "a type of a later IR version": (
        one_node(helper.make_node("DequantizeLinear", ["w", "x"], ["y"]), opset=21, ir_version=10, weights=[INT4]),
        r"tensors of type INT4, which need IR version 10\. ONNX Runtime 1\.17 .* up to 9\. .*1\.18 or newer",
    ),
    "what onnx converts by half": (
        one_node(helper.make_node("Cast", ["x"], ["y"], to=1, saturate=0), opset=20),
        r"uses Cast of a newer opset than 18.*--opset 18",
    ),
    "an operator nobody knows to write otherwise": (
        one_node(helper.make_node("TensorScatter", ["x", "x"], ["y"]), opset=24),
        r"uses TensorScatter of a newer opset than 20.*--opset 18",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_model_that_a_release_cannot_read_is_refused(tmp_path, what):
    model, said = UNREADABLE[what]
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ShippingError, match=said):
        mobile.lower(tmp_path / "new.onnx", tmp_path / "old.onnx", "1.15" if "half" in what else "1.17")
    assert not (tmp_path / "old.onnx").exists()


def test_a_later_set_of_onnx_runtime_s_operators_is_refused(built_tiny, tmp_path):
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
    """By hand, as an export of before would: the last attention of the artifact's file has its one query under a
    key_padding_mask."""
    model = onnx.load(artifact.onnx_path)
    (fused,) = (node for node in model.graph.node if node.op_type == "Attention")
    (heads,) = (node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    heads.input[:] = [*heads.input[:3], "", fused.input[3]]
    onnx.save(model, artifact.onnx_path)
    manifest = dataclasses.replace(artifact.manifest, files=list_files(artifact.path))
    (artifact.path / MANIFEST).write_text(manifest.to_json())


@pytest.mark.slow
def test_a_release_that_answers_the_graph_s_padded_batches_wrongly_is_refused(tiny, tmp_path, say):
    mask_by_key_padding(tiny.load("onnx-fp32"))
    where = ("--model", tiny.model, "--exported", tiny.exported, "--output", tmp_path / "b")
    code, out, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", "1.20", *where)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "Error: onnx-fp32 uses MultiHeadAttention with key_padding_mask longer than the query (correct from 1.21 on). "
        "ONNX Runtime 1.20 refuses padded batches of it, or computes them incorrectly. Ship it for --ort-mobile 1.21 "
        "or newer, or ship a variant with standard operators of opset 18, such as onnx-std."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]
    (model,) = ship(tiny, tmp_path / "b", "onnx-fp32", ort_mobile="1.21")["models"]
    assert model["oldest_release"] == "1.21"


@pytest.mark.slow
def test_a_new_operator_beside_onnx_runtime_s_own_is_refused(of_opset_20, tmp_path):
    """onnx knows no types behind a quantised matmul, so it cannot write the Gelu there in other operators."""
    with pytest.raises(ShippingError, match=r"onnx-int8 uses Gelu of a newer opset than 19.*--opset 18"):
        ship(of_opset_20, tmp_path / "b", "onnx-int8", ort_mobile="1.16")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_release_that_reads_the_operator_set_and_lacks_a_kernel_is_refused(of_opset_20, tmp_path):
    """ONNX Runtime 1.17 runs Gelu of an .onnx file by its definition, and in ORT format not at all."""
    with pytest.raises(ShippingError, match=r"onnx-std uses Gelu \(from 1\.18 on\), which ONNX Runtime 1\.17 lacks"):
        ship(of_opset_20, tmp_path / "b", "onnx-std", ort_mobile="1.17")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_operators_in_4_bits_need_the_releases_that_have_them(tmp_path):
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


def test_the_table_of_releases_answers():
    gather, bits = Use("com.microsoft", "GatherBlockQuantized"), Use("com.microsoft", "GatherBlockQuantized", "bits")
    assert find_unsupported("1.19", [gather, bits]) == [gather]  # the operator says it all
    assert find_unsupported("1.22", [gather, bits]) == [bits]
    assert find_unsupported("1.23", [gather, bits]) == []
    assert oldest_supporting_release([gather, bits, Use("", "Add")]) == "1.23"
    assert oldest_supporting_release([]) == ORDER[0]
    unknown = [
        Use("com.microsoft", "GroupQueryAttention"),
        Use("com.microsoft", "Gelu", "tomorrow"),
        Use("com.microsoft.nchwc", "Conv"),
    ]
    assert find_unsupported(ORDER[-1], unknown) == sorted(unknown)
    assert oldest_supporting_release([gather, *unknown]) is None
    assert "in no known release" in str(unknown[0])
    assert find_unsupported("1.17", [Use("com.microsoft", "MatMulNBits", "input 3")]) == []
    assert find_unsupported("1.17", [Use("com.microsoft", "MatMulNBits", "input 5")]) != []
    assert sorted(ORDER, key=lambda release: int(release.split(".")[1])) == ORDER
    limits = [(its.ir_version, its.opset, its.ort_format) for its in RELEASES.values()]
    assert limits == sorted(limits)
    assert {release for by_release in OPERATORS.values() for release in by_release} <= set(ORDER)


def test_the_table_of_operators_agrees_with_the_runtime_installed_here():
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    here = ".".join(onnxruntime.__version__.split(".")[:2])
    if here not in RELEASES:
        pytest.skip(f"ONNX Runtime {here} is not in the table")
    schemas = {s.name: s for s in state.get_all_operator_schema() if s.domain == "com.microsoft"}
    kernels = {k.op_name for k in state.get_all_opkernel_def() if "CPU" in k.provider and k.domain == "com.microsoft"}
    for operator, by_release in OPERATORS.items():
        known = {name for names in by_release.values() for name in names if not name.startswith("input ")}
        if not find_unsupported(here, [Use("com.microsoft", operator)]):
            assert operator in kernels
            assert set(schemas[operator].attributes) <= known or here != ORDER[-1], operator
    standard = {k.op_name for k in state.get_all_opkernel_def() if "CPU" in k.provider and not k.domain}
    assert standard >= {operator for operator in FIRST_KERNELS if not find_unsupported(here, [Use("", operator)])}


def test_the_limits_are_those_of_the_runtime_installed_here(tmp_path):
    import onnxruntime

    here = ".".join(onnxruntime.__version__.split(".")[:2])
    if here not in RELEASES:
        pytest.skip(f"ONNX Runtime {here} is not in the table")
    limit, node = RELEASES[here], helper.make_node("Identity", ["x"], ["y"])

    def reads(**versions):
        onnx.save(one_node(node, **versions), tmp_path / "model.onnx")
        try:
            onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime raises a class for every status
            return False
        return True

    assert reads(ir_version=limit.ir_version, opset=limit.opset)
    assert not reads(ir_version=limit.ir_version + 1)
    assert not reads(opset=limit.opset + 1)


@pytest.mark.slow
def test_an_operator_without_a_cpu_kernel_is_refused(tmp_path):
    node = helper.make_node("BiasSoftmax", ["x", "x"], ["y"], domain="com.microsoft", axis=0, is_inner_broadcast=0)
    onnx.save(one_node(node, domain="com.microsoft"), tmp_path / "model.onnx")
    with pytest.raises(ShippingError, match=r"model\.onnx cannot be saved in ORT format: .*BiasSoftmax"):
        ort_format.save(tmp_path / "model.onnx", tmp_path / "model.ort")


@pytest.mark.slow
def test_answers_that_changed_on_the_way_are_a_verdict(tiny, tmp_path, monkeypatch):
    def bend(source, target, release):
        model = onnx.load(source)
        bias = next(i for i in model.graph.initializer if i.name.endswith("classifier.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(3e-4), bias.name))
        onnx.save(model, target)

    monkeypatch.setattr(mobile, "lower", bend)
    with pytest.raises(
        VerdictError, match=r"logits of onnx-fp32\.onnx differ from the logits of onnx-fp32: largest .* 0\.0003"
    ):
        ship(tiny, tmp_path / "b", "onnx-fp32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported"]


@pytest.mark.parametrize("kind", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_a_foreign_file_or_folder_is_not_overwritten(tiny, tmp_path, kind):
    lies_there(tmp_path / "b", kind)
    with pytest.raises(ArtifactError, match=str(tmp_path / "b")):
        ship(tiny, tmp_path / "b", "onnx-int8")


@pytest.mark.parametrize("name", ["torch-fp32", "bnb-nf4"])
def test_a_pytorch_variant_is_not_shipped(built_tiny, tmp_path, name):
    with pytest.raises(ShippingError, match=r"no \.onnx file"):
        ship(built_tiny, tmp_path / "b", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_and_its_usage_errors(tiny, say):
    where = ("--model", tiny.model, "--exported", tiny.exported)
    place = tiny.exported / tiny.model / "bundle-mobile"
    code, out, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", "1.20", *where)
    assert (code, out.strip()) == (0, str(place)), err
    assert "onnx-fp32.ort: largest |Δlogit| 0 " in err
    assert "onnx-fp32.ort: largest" in say("verify", place)[1]
    for wrong in ("1.14", "1.17.3", "new", ""):
        code, _, err = say("ship", "onnx-fp32", "--target", "mobile", "--ort-mobile", wrong, *where)
        assert code == 2
        assert all(f"'{release}'" in err for release in RELEASES), err
    code, _, err = say("ship", "onnx-fp32", "--target", "web", "--ort-mobile", "1.17", *where)
    assert code == 2
    assert "--ort-mobile needs --target mobile" in err


@pytest.mark.slow
def test_weights_of_the_other_format_are_unsigned_where_they_could_saturate(phone):
    """No session option reaches a file in ORT format."""
    for name, signed in (("onnx-int8", False), ("onnx-int8-portable", True)):
        content = ort_format.read_root((phone / f"{name}.ort").read_bytes()).Model().Graph()
        kinds = {
            content.Initializers(index).Name().decode(): content.Initializers(index).DataType()
            for index in range(content.InitializersLength())
        }
        products = [node for node in map(content.Nodes, range(content.NodesLength())) if node.OpType() in PRODUCTS]
        assert products
        weights = {kinds[node.Inputs(1).decode()] for node in products}
        assert weights == {TensorProto.INT8 if signed else TensorProto.UINT8}, name


@pytest.mark.slow
def test_a_phone_s_bundle_says_where_its_models_are_exact(phone):
    full, portable, plain = json.loads((phone / "bundle.json").read_text())["models"]
    assert "64-bit ARM" in full["exact_on"]
    assert portable["exact_on"] == plain["exact_on"] == "any processor"
    readme = (phone / "README.md").read_text()
    assert "The `.ort` files are exact on every processor" in readme
    assert '`options.addConfigEntry("session.x64quantprecision", "1")`' in readme


@pytest.mark.slow
def test_the_checker_s_findings_are_in_the_bundle_in_words(phone):
    readme = (phone / "README.md").read_text()
    assert "nothing was measured on a phone" in readme
    for model in json.loads((phone / "bundle.json").read_text())["models"]:
        assert [(part["provider"], part["fixed_shapes"]) for part in model["providers"]] == [
            (name, fixed)
            for fixed in (False, True)
            for name in ("NNAPI", "CoreML, neural network", "CoreML, ML program")
        ]
        for part in model["providers"]:
            assert 0 < part["taken"] < part["nodes"]
            assert part["worth_trying"] in ("yes", "maybe", "no")
            shapes = "fixed" if part["fixed_shapes"] else "dynamic"
            row = (model["variant"], part["provider"], shapes, f"{part['taken']} of {part['nodes']}")
            assert f"| {' | '.join(row)} | {part['partitions']} | {part['worth_trying']} |" in readme


@pytest.mark.slow
def test_the_code_of_the_readme_names_what_is_there(phone):
    readme = (phone / "README.md").read_text()
    body = json.loads((phone / "bundle.json").read_text())
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
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_byte_of_the_other_format_is_seen(bundle, where):
    content = bytearray((bundle / "onnx-int8.ort").read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[where]] ^= 1
    (bundle / "onnx-int8.ort").write_bytes(content)
    with pytest.raises(VerdictError, match=r"onnx-int8\.ort"):
        shipping.verify(bundle)
    assert bundled.main(bundle) == 3


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another model", "no model", "unlisted"])
def test_another_model_in_the_other_format_is_seen(bundle, change):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_872_sentences_are_answered_alike_in_either_format(reference, tmp_path, name):
    ship(reference, tmp_path / "b", name)
    manifest = reference.load(name).manifest
    encoder = Encoder.open(tmp_path / "b", [spec.name for spec in manifest.inputs], manifest.max_length)
    plain, phones = (
        open_session(tmp_path / "b" / f"{name}.{kind}", "onnx", Place("cpu", 1)) for kind in ("onnx", "ort")
    )
    batches = [pad([row], encoder.names, encoder.pad_id) for row in encoder.encode(inputs.load_embedded().texts)]
    assert len(batches) == 872
    deltas = [float(np.abs(plain.run(batch) - phones.run(batch)).max()) for batch in batches]
    assert max(deltas) < 1e-5, sorted(deltas)[-5:]
