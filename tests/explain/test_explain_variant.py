"""Tests of the explanations of variants."""

import dataclasses
import json
import shutil

import pytest
from conftest import DEFAULT_VARIANTS
from sample_results import FP32, INT8, RUN, result

from toolchain.artifacts.fact_summaries import PASS_EFFECTS, summarize_rewrites
from toolchain.artifacts.steps import Export
from toolchain.build.pipeline import ensure
from toolchain.explain import variant as explaining
from toolchain.explain.origin import trace_lineage
from toolchain.explain.page import page_lines
from toolchain.explain.relatives import find_relatives
from toolchain.explain.variant import Bytes
from toolchain.passes import PASSES
from toolchain.results.folder import ResultsFolder


@pytest.fixture
def explain(tiny, say, tmp_path):
    """Runs `toolchain explain` on a copy of the tiny workspace, with an empty folder of result files."""

    def run(*arguments):
        return say("explain", *arguments, "--model", tiny.model, "--exported", tiny.exported, "--results", tmp_path)

    return run


@pytest.fixture
def explanation(tiny, tmp_path):
    return explaining.explain_artifact(tiny, tiny.load("onnx-int8"), ResultsFolder(tmp_path), None, pytest.fail)


def relations(workspace, name):
    relatives = find_relatives(workspace, workspace.load(name))
    return {relative.variant: (relative.relations, relative.state) for relative in relatives}


def test_the_page_shows_lineage_bytes_and_relatives(explain, tiny):
    code, out, err = explain("onnx-int8")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    steps = [
        line.split(":")[0]
        for line in lines[lines.index("How it was built") :]
        if line.split(":")[0] in DEFAULT_VARIANTS
    ]
    assert steps == DEFAULT_VARIANTS
    assert "onnx-std: export (opset=18, exporter=torch)" in out
    assert "* pass quantize-embedding, 2 rewrites: embedding look-ups now read 8-bit tables" in lines
    assert "weights of the embeddings" in out
    assert "`toolchain explain onnx-int8 --profile`" in out
    assert "No result file has this artifact" in out
    assert tiny.load("onnx-int8").manifest.id in lines[1]


def test_shown_bytes_add_up_to_all_files(explain, tiny):
    body = json.loads(explain("onnx-int8", "--json")[1])
    manifest = tiny.load("onnx-int8").manifest
    assert body["size_bytes"] == sum(body["bytes"]["files"].values()) == manifest.size_bytes
    assert body["bytes"]["by_part"] == manifest.facts["bytes_by_part"]
    assert [ancestor["variant"] for ancestor in body["lineage"]] == DEFAULT_VARIANTS
    assert body["lineage"][-1]["id"] == body["id"] == manifest.id
    assert body["time"] is None


def test_a_profile_measures_the_operators_of_the_given_texts(explain, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "a film,0\nanother film,1\n" * 2)
    code, out, _ = explain("onnx-int8", "--profile", "--data", tmp_path / "rows.csv")
    assert code == 0
    assert "4 single texts of rows.csv, one thread" in out
    assert "all other operators" in out
    time = json.loads(explain("onnx-int8", "--profile", "--data", tmp_path / "rows.csv", "--json")[1])["time"]
    assert (time["texts"], time["rounds"], time["threads"]) == (4, explaining.PROFILE_ROUNDS, 1)
    assert "LayerNormalization" in time["operator_shares"]
    assert sum(time["operator_shares"].values()) == pytest.approx(1, abs=0.01)


def test_without_data_a_profile_uses_embedded_texts(explain, monkeypatch):
    monkeypatch.setattr(explaining, "PROFILE_TEXTS", 3)
    monkeypatch.setattr(explaining, "PROFILE_ROUNDS", 1)
    assert "3 single texts of sst2" in explain("onnx-std", "--profile")[1]


def test_result_files_with_the_artifact_and_its_relatives_are_listed(say, tiny, tmp_path):
    rows = [
        dataclasses.replace(row, model=tiny.model, artifact_id=tiny.load(row.variant).manifest.id)
        for row in (FP32, INT8)
    ]
    result(*rows, run=RUN).write(tmp_path / "measured.json")
    result(dataclasses.replace(rows[1], artifact_id="another"), run=RUN).write(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    options = ("--model", tiny.model, "--exported", tiny.exported, "--results", tmp_path)
    code, out, err = say("explain", rows[1].variant, *options)
    assert code == 0
    assert f"{tmp_path / 'measured.json'}: 2026-01-01T00:00:00+00:00, c, d" in out
    assert "other.json" not in out
    assert f"{rows[0].variant}@cpu" in out
    assert "broken.json" in err  # an unreadable file is reported, and is no error
    run = json.loads(say("explain", rows[1].variant, *options, "--json")[1])["results"][0]
    assert [cell["cell"] for cell in run["cells"]] == [f"{row.variant}@cpu" for row in reversed(rows)]
    assert run["cells"][0]["p50_ms"] == rows[1].latency_ms["p50"]


def test_a_replaced_ancestor_ends_the_lineage(explain, tiny):
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(opset=17)}, lambda _: None)
    lineage = trace_lineage(tiny, tiny.load("onnx-int8"))
    assert [(ancestor.variant, ancestor.state) for ancestor in lineage] == [
        ("onnx-std", "changed"),
        ("onnx-fp32", "built"),
        ("onnx-int8", "built"),
    ]
    assert "onnx-std: another build replaced it later" in explain("onnx-int8")[1]


def test_a_missing_ancestor_ends_the_lineage_and_is_no_error(explain, tiny):
    shutil.rmtree(tiny.path("onnx-fp32"))
    code, out, _ = explain("onnx-int8")
    assert code == 0
    assert "onnx-fp32: its folder no longer exists" in out
    assert relations(tiny, "onnx-int8")["onnx-fp32"] == (("parent", "unquantised"), "missing")


def test_an_unusable_relative_is_not_called_missing(tiny):
    (tiny.path("onnx-fp32") / "manifest.json").write_text("{")
    assert relations(tiny, "onnx-int8")["onnx-fp32"] == (("parent", "unquantised"), "unusable")


def test_relatives_differ_by_one_kind_of_compression(tiny, built_tiny):
    assert relations(tiny, "onnx-int8") == {
        "onnx-fp32": (("parent", "unquantised"), "built"),
        "torch-fp32": (("imported model",), "built"),
    }
    assert relations(tiny, "torch-fp32") == {}
    ensure(built_tiny, ["torch-pruned50-mask"], {}, lambda _: None)
    assert relations(built_tiny, "torch-pruned50-mask") == {
        "torch-fp32": (("parent", "unpruned", "imported model"), "built")
    }
    ensure(built_tiny, ["onnx-std-pruned50-mask"], {}, lambda _: None)
    assert relations(built_tiny, "onnx-std-pruned50-mask")["onnx-std"] == (("unpruned",), "built")


def test_an_imported_model_explains_its_checkpoint(explain):
    code, out, _ = explain("torch-fp32")
    assert code == 0
    assert "from the folder tiny, DistilBertForSequenceClassification" in out
    assert "It is the imported model" in out
    assert "Only ONNX variants for the CPU" in out


def test_without_facts_the_page_lists_files(explanation):
    plain = dataclasses.replace(explanation, bytes=Bytes({}, {}, {"model.onnx": 900, "tokenizer.json": 100}))
    lines = [line.split() for line in page_lines(plain)]
    assert ["model.onnx", "900", "B", "90.0%"] in lines


def test_facts_that_exceed_the_files_are_not_shown_as_shares(explanation):
    foreign = dataclasses.replace(explanation, bytes=Bytes({"encoder": 10**12}, {}, {"model.onnx": 900}))
    assert not any("encoder" in line for line in page_lines(foreign))


def test_every_pass_has_an_effect():
    counts = dict.fromkeys(PASSES, 2)
    for name, line in zip(counts, summarize_rewrites(counts), strict=True):
        assert line.startswith(f"pass {name}, 2 rewrites: "), name
    assert set(PASS_EFFECTS) <= set(PASSES)
    assert "4 bits" in summarize_rewrites({"quantize-linear-int4": 1})[0]
    assert "4-bit" in summarize_rewrites({"quantize-embedding-int4-webgpu": 1})[0]
    assert summarize_rewrites({"padding": 0, "future-pass": 3}) == [
        "pass padding found nothing to rewrite",
        "pass future-pass, 3 rewrites",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["onnx-int9"], 1, "Did you mean onnx-int8"),
        (["onnx-int4"], 1, "onnx-int4 is not built for the model tiny. Build it: `toolchain validate onnx-int4`."),
        (["onnx-int8+small"], 1, "Build it with --name small."),
        (["torch-fp32", "--profile"], 2, "torch-fp32 runs on PyTorch"),
        (["onnx-int8", "--data", "rows.csv"], 2, "--data needs --profile."),
        (["onnx-int8", "--profile", "--data", "nowhere.csv"], 1, "nowhere.csv"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_input_is_one_sentence(explain, arguments, code, message):
    actual_code, out, err = explain(*arguments)
    assert (actual_code, out) == (code, "")
    assert message in err
    assert err.count("Error: ") == 1


@pytest.mark.parametrize("file", ["model.onnx", "manifest.json"])
def test_a_modified_artifact_is_refused(explain, tiny, file):
    path = tiny.path("onnx-int8") / file
    content = path.read_bytes()
    path.write_bytes(content.replace(b"onnx-fp32", b"onnx-std0", 1) if file == "manifest.json" else content + b"\0")
    code, out, err = explain("onnx-int8")
    assert (code, out) == (1, "")
    assert "build the variant again" in err or "build the artifact again" in err
    assert len(err.splitlines()) == 1
