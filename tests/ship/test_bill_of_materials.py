"""Tests of mlbom.json: its schema, its content, and that equal bundles have equal bills of materials."""

import dataclasses
import json
import re

import pytest
from conftest import ROOT

from toolchain.artifacts.store import sha256
from toolchain.progress import no_bar
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile
from toolchain.ship import shipping
from toolchain.ship.bill_of_materials import bill_of_materials
from toolchain.ship.shipping import Order
from toolchain.ship.targets import clients


def make(workspace, output, *names, target="python", **order):
    shipping.ship(workspace, Order(names, target, demo=False, **order), output, lambda event: None, no_bar)
    return output


def read(folder):
    return json.loads((folder / "mlbom.json").read_text())


@pytest.fixture(scope="module")
def measured(built_tiny, tmp_path_factory):
    """A folder of result files with one benchmark row of the tiny model's onnx-int8."""
    file = ResultFile.read(ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json")
    row = next(row for row in file.rows if row.variant == "onnx-int8")
    row = dataclasses.replace(row, artifact_id=built_tiny.load("onnx-int8").manifest.id)
    results = ResultsFolder(tmp_path_factory.mktemp("results"))
    results.local.mkdir(parents=True)
    dataclasses.replace(file, rows=(row,)).write(results.local / "a.json")
    return results


@pytest.fixture(scope="module")
def bundles(built_tiny, measured, tmp_path_factory):
    """A folder with bundles for Python and the web. Tests must not change these bundles."""
    folder = tmp_path_factory.mktemp("bundles")
    make(built_tiny, folder / "python", "onnx-int8", "onnx-fp32", license="apache-2.0", results=measured)
    make(built_tiny, folder / "web", "onnx-int8", target="web", license="my own terms")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", ["python", "web"])
def test_the_bill_of_materials_follows_the_schema(bundles, target):
    pytest.importorskip("cyclonedx", reason="needs the extra `test`")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (bundles / target / "mlbom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    broken = text.replace('"machine-learning-model"', '"magic"', 1)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_every_reference_has_one_component(bundles):
    for target in ("python", "web"):
        body = read(bundles / target)
        references = [component["bom-ref"] for component in body["components"]]
        references.append(body["metadata"]["component"]["bom-ref"])
        assert len(set(references)) == len(references)
        for dependency in body["dependencies"]:
            assert {dependency["ref"], *dependency["dependsOn"]} <= set(references)


def test_it_describes_models_licence_and_data(bundles, built_tiny):
    body = read(bundles / "python")
    int8, fp32 = (each for each in body["components"] if each["type"] == "machine-learning-model")
    assert int8["hashes"] == [{"alg": "SHA-256", "content": sha256(bundles / "python" / "model.onnx")}]
    assert int8["version"] == built_tiny.load("onnx-int8").manifest.id
    assert int8["licenses"] == [{"expression": "Apache-2.0"}]
    assert read(bundles / "web")["components"][0]["licenses"] == [{"license": {"name": "my own terms"}}]
    assert int8["modelCard"]["modelParameters"]["task"] == "text-classification"
    (metric,) = int8["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert (metric["type"], metric["slice"]) == ("accuracy", "sst2")
    assert 0.5 < float(metric["value"]) < 1
    assert "quantitativeAnalysis" not in fp32["modelCard"]
    (data,) = (each for each in body["components"] if each["type"] == "data")
    assert data["description"] == "not stated"
    assert int8["modelCard"]["modelParameters"]["datasets"] == [{"ref": data["bom-ref"]}]


def test_it_names_the_packages_of_the_run_time_and_of_the_build(bundles, built_tiny):
    versions = built_tiny.load("onnx-int8").manifest.environment["versions"]
    components = read(bundles / "python")["components"]
    built = {each["name"]: each["version"] for each in components if each.get("scope") == "excluded"}
    assert built == versions
    needed = {each["name"]: each for each in components if each.get("scope") == "required"}
    assert needed.keys() >= {"onnxruntime", "tokenizers", "numpy", "protobuf"}
    assert f"onnxruntime=={needed['onnxruntime']['version']} " in (bundles / "python" / "requirements.lock").read_text()
    assert needed["numpy"]["purl"] == f"pkg:pypi/numpy@{needed['numpy']['version']}"
    web = {each["name"]: each for each in read(bundles / "web")["components"] if each.get("scope") == "required"}
    assert web.keys() == set(clients.DEPENDENCIES)
    assert web[clients.TRANSFORMERS]["purl"].startswith("pkg:npm/%40huggingface/transformers@")


def test_equal_bundles_have_equal_bills_without_time_and_path(bundles, built_tiny, measured, tmp_path):
    make(built_tiny, tmp_path / "b", "onnx-int8", "onnx-fp32", license="apache-2.0", results=measured)
    text = (tmp_path / "b" / "mlbom.json").read_text()
    assert text == (bundles / "python" / "mlbom.json").read_text()
    assert "timestamp" not in text
    assert str(built_tiny.exported) not in text
    serials = [read(bundles / target)["serialNumber"] for target in ("python", "web")]
    assert len(set(serials)) == 2
    for serial in serials:
        assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", serial)


@pytest.mark.parametrize(
    ("source", "purl"),
    [
        ({"kind": "hub", "ref": "owner/model", "revision": "abc"}, "pkg:huggingface/owner/model@abc"),
        ({"kind": "folder", "ref": "model", "revision": "abc"}, None),
    ],
)
def test_the_origin_of_a_model_of_the_hub_has_an_address(bundles, source, purl):
    body = json.loads((bundles / "python" / "bundle.json").read_text())
    body["model"]["source"] = source
    model = bill_of_materials(body, [], bundles / "python")["components"][0]
    assert model["pedigree"]["ancestors"][0].get("purl") == purl
