"""Tests of all steps on one small random model of each architecture, with the usual tokenizer of the architecture."""

import functools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import write_short_rows
from exit_graphs import add_exits, expected_logits, make_head, open_model
from tiny_architectures import ARCHITECTURES, PLAIN, POSITIONAL, PRUNABLE, TYPED, make

from toolchain import exporters, passes
from toolchain.artifacts.steps import CUDA_PASSES, Export, Optimize, Quantize, Recover
from toolchain.backends import Place, open_session
from toolchain.backends.pytorch import load_model
from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import TrainingSource
from toolchain.errors import CheckpointError, GraphError, PruningError
from toolchain.models import architectures
from toolchain.passes.exits import hidden_states
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_linear import layers_of
from toolchain.progress import no_bar
from toolchain.ship import checking, shipping
from toolchain.ship.shipping import Order

TEXTS = ["a film", "an unflinchingly bleak and desperate story of nobody at all", "good"]
FAST = Protocol(passes=1, min_s=0.05, pass_s=10, starts=1, threads=1, batch_size=8)

IS_TRANSFORMERS_5 = transformers.__version__.startswith("5.")
DIFFERENT_ATTENTIONS = ("distilbert", "roberta", "deberta-v2", "mpnet", "modernbert")

SAME_ATTENTION = "the same attention as an architecture that is tested"

pytestmark = pytest.mark.slow


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Writes training data of 60 short rows."""
    return TrainingSource(str(write_short_rows(tmp_path_factory.mktemp("train") / "train.csv", 60)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, rows):
    """Returns a function: kind of model → workspace with its unpruned variants, which tests must not change."""

    @functools.cache
    def build(kind):
        folder = make(tmp_path_factory.mktemp("checkpoint") / kind, kind)
        opened_workspace = Workspace.open(str(folder), tmp_path_factory.mktemp("exported"), None, rows)
        ensure(opened_workspace, ["onnx-int8", "onnx-std-int8"], {}, quiet)
        return opened_workspace

    return build


def graph(workspace, name):
    return passes.read(workspace.path(name) / "model.onnx")


def stored_bytes(workspace, name):
    return (workspace.path(name) / "model.onnx").stat().st_size


# --- export, optimise, validate, quantise


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_variant_has_the_models_inputs_and_gives_pytorchs_logits(workspace, kind):
    model_workspace, architecture = workspace(kind), ARCHITECTURES[kind]
    for name in ("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8", "onnx-std-int8"):
        manifest = model_workspace.load(name).manifest
        assert {spec.name for spec in manifest.inputs} == set(architecture.inputs)
        assert manifest.max_length == 128
        assert manifest.validation["passed"]
    for name in ("onnx-std", "onnx-fp32"):
        deltas = model_workspace.load(name).manifest.validation["grid_largest_delta"]
        assert max(deltas.values()) <= 1e-4
        for batch_name in ("7 texts, left padding", "7 mixed lengths, left padding"):
            assert (batch_name in deltas) == (kind != "modernbert")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_passes_fuse_and_quantise_the_expected_nodes(workspace, kind):
    model_workspace, architecture = workspace(kind), ARCHITECTURES[kind]
    fp32, int8, std = (model_workspace.load(n).manifest.facts for n in ("onnx-fp32", "onnx-int8", "onnx-std-int8"))
    # the pass first-query replaces `single_query_count` Attention nodes by MultiHeadAttention with one query
    single_query_count = fp32["rewrites"]["first-query"]
    assert single_query_count == fp32["operators"].get("MultiHeadAttention", 0)
    fused_counts = {k: n for k, n in fp32["operators"].items() if k in ("Attention", "Gelu", "FastGelu")}
    assert (
        fused_counts | ({"Attention": fused_counts["Attention"] + single_query_count} if single_query_count else {})
        == architecture.fused
    )
    assert fp32["rewrites"]["fuse"] == sum(architecture.fused.values())
    assert int8["rewrites"]["quantize-linear"] == architecture.linear + single_query_count
    products = ("DynamicQuantizeMatMul", "QAttention")
    assert sum(int8["operators"].get(name, 0) for name in products) == architecture.linear + single_query_count
    # In the standard graph, query, key and value are three separate layers.
    assert std["operators"]["MatMulInteger"] == architecture.linear + 2 * architecture.fused.get("Attention", 0)
    assert int8["rewrites"]["quantize-embedding"] == std["rewrites"]["quantize-embedding"] == architecture.tables
    remaining = Counter(n.op_type for n in graph(model_workspace, "onnx-int8").graph if n.op_type in ("MatMul", "Gemm"))
    # In all architectures except EuroBERT, one Gemm gives the logits. EuroBERT averages the logits of all tokens.
    assert remaining["Gemm"] == int(kind != "eurobert")


@pytest.mark.parametrize("exporter", ["optimum", "dynamo"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_exporter_gives_the_logits_and_rewrites_of_tracing(workspace, kind, exporter):
    if cause := exporters.unmet_requirement(exporter):
        pytest.skip(cause)
    if exporter == "dynamo" and kind not in (DIFFERENT_ATTENTIONS if IS_TRANSFORMERS_5 else DIFFERENT_ATTENTIONS[:1]):
        pytest.skip(SAME_ATTENTION)
    model_workspace = workspace(kind)
    names = (exporter, "torch")
    variants = {f"onnx-std+{name}": Export(exporter=name) for name in names} | {
        f"onnx-fp32+{name}": Optimize() for name in names
    }
    ensure(model_workspace, list(variants), variants, quiet)
    other, traced = (model_workspace.load(f"onnx-fp32+{name}").manifest for name in names)
    assert other.facts["rewrites"] == traced.facts["rewrites"]
    other_layers, traced_layers = (layers_of(graph(model_workspace, f"onnx-fp32+{name}")) for name in names)
    assert other_layers == traced_layers
    context = context_of(model_workspace.path("torch-fp32"))
    for_cuda = [
        passes.rewrite(graph(model_workspace, f"onnx-std+{name}"), CUDA_PASSES[:1], context)[1] for name in names
    ]
    assert for_cuda[0] == for_cuda[1]
    if exporter == "optimum":  # the operators around masks and positions differ in graphs of the exporter dynamo
        assert other.facts["operators"] == traced.facts["operators"]
    encoder = Encoder.open(model_workspace.path("onnx-std"), ARCHITECTURES[kind].inputs, traced.max_length)
    ids = encoder.encode(TEXTS)
    for rows in (ids, ids[:1], [ids[0][:1]]):  # several rows, one row, and one token
        batch = pad(rows, encoder.names, encoder.pad_id)
        for variant in ("onnx-std", "onnx-fp32"):
            logits = [
                open_session(model_workspace.path(f"{variant}+{name}"), "onnx", Place("cpu", 1)).run(batch)
                for name in names
            ]
            assert np.abs(logits[0] - logits[1]).max() < 1e-5


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_int8_is_smaller_also_where_layers_share_weights(workspace, kind):
    model_workspace = workspace(kind)
    fp32, int8 = (model_workspace.load(name).manifest.facts["bytes_by_dtype"] for name in ("onnx-fp32", "onnx-int8"))
    torch_fp32 = model_workspace.load("torch-fp32").manifest.facts["bytes_by_dtype"]["float32"]
    assert fp32["float32"] <= 1.02 * torch_fp32  # no weight is stored both packed and unpacked
    assert int8["int8"] < 0.27 * fp32["float32"]
    assert int8["float32"] < 0.25 * fp32["float32"]
    assert stored_bytes(model_workspace, "onnx-int8") < stored_bytes(model_workspace, "onnx-fp32")
    assert stored_bytes(model_workspace, "onnx-std-int8") < stored_bytes(model_workspace, "onnx-std")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padding_on_the_right_changes_no_logits(workspace, kind):
    """Padding must not change the positions of tokens; RoBERTa counts only tokens that are not padding."""
    model_workspace = workspace(kind)
    manifest = model_workspace.load("onnx-fp32").manifest
    encoder = Encoder.open(model_workspace.path("onnx-fp32"), ARCHITECTURES[kind].inputs, manifest.max_length)
    assert encoder.pad_id == (1 if kind in ("roberta", "xlm-roberta", "mpnet") else 0)
    ids = encoder.encode(TEXTS)
    session = open_session(model_workspace.path("onnx-fp32"), "onnx", Place("cpu", 1))
    single_logits = np.concatenate([session.run(pad([row], encoder.names, encoder.pad_id)) for row in ids])
    batch_logits = session.run(pad(ids, encoder.names, encoder.pad_id, width=40))
    assert np.abs(batch_logits - single_logits).max() < 1e-4
    # Dynamic int8 scales depend on all tokens, so the pass `padding` gives padding tokens the embedding of the first
    # token. The pass `padding` does not apply to relative positions (deberta-v2, mpnet), to rotated queries and keys
    # (modernbert, eurobert), or to combined embeddings of neighbouring tokens (mobilebert).
    for name in ("onnx-int8", "onnx-std-int8"):
        replacements = model_workspace.load(name).manifest.facts["rewrites"]["padding"]
        assert replacements == int(kind not in POSITIONAL)
        session = open_session(model_workspace.path(name), "onnx", Place("cpu", 1))
        for row in ids if replacements else []:
            own_width, padded = (
                session.run(pad([row], encoder.names, encoder.pad_id, width=width)) for width in (0, 40)
            )
            assert np.abs(padded - own_width).max() < 1e-4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_texts_exit_behind_each_layer(workspace, kind):
    model_workspace = workspace(kind)
    encoder = Encoder.open(model_workspace.path("onnx-fp32"), ARCHITECTURES[kind].inputs, 128)
    batch = pad(encoder.encode(TEXTS), encoder.names, encoder.pad_id)
    layers, width = {"minilm": (3, 48), "albert": (6, 32), "mobilebert": (2, 64), "modernbert": (3, 32)}.get(
        kind, (2, 32)
    )
    for name in ("onnx-std", "onnx-fp32", "onnx-int8"):
        path = model_workspace.path(name) / "model.onnx"
        states = hidden_states(passes.read(path))
        assert len(states) == layers
        heads = [make_head(layer, 0.9, seed=3, width=width) for layer in range(len(states))]
        if any(node.op_type == "If" for node in graph(model_workspace, name).graph):
            # optimum exports DeBERTa with an If of its own in each layer
            with pytest.raises(GraphError, match="contain a node If with a graph of its own"):
                add_exits(path, *heads)
            continue
        with_exits = add_exits(path, *heads)
        logits = open_model(with_exits).run(None, batch)[0]
        if name != "onnx-int8":  # a batch of int8 texts shares its scales, also with texts that leave
            assert np.abs(logits - expected_logits(path, heads, batch)[0]).max() < 1e-4
        products = [
            Counter(node.op_type for node in model.graph.all_nodes())
            for model in (graph(model_workspace, name), with_exits)
        ]
        for operator in ("LayerNormalization", "Attention", "MultiHeadAttention", "DynamicQuantizeMatMul"):
            assert products[0][operator] == products[1][operator]  # no layer stands in the graph twice


def test_token_types_are_an_input_only_of_models_that_use_them(tmp_path):
    """Token types are an input only if the tokenizer names token types and the model has more than one type."""
    make(tmp_path / "silent", "bert")
    file = tmp_path / "silent" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": list(PLAIN)}))
    make(tmp_path / "single", "bert", type_vocab_size=1)
    make(tmp_path / "talking", "roberta")
    file = tmp_path / "talking" / "tokenizer_config.json"
    body = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({**body, "model_input_names": list(TYPED)}))
    for name in ("silent", "single", "talking"):
        artifact = ensure(Workspace.open(str(tmp_path / name), tmp_path / "out"), ["onnx-std"], {}, quiet)["onnx-std"]
        assert {spec.name for spec in artifact.manifest.inputs} == set(PLAIN)


@pytest.mark.parametrize("kind", ["albert", "deberta-v2"])
def test_int4_and_static_graphs_store_shared_weights_once(workspace, kind):
    """Smoothing has separate factors for each layer, so it would need a copy of a shared weight for each layer."""
    model_workspace, architecture = workspace(kind), ARCHITECTURES[kind]
    names = ["onnx-int4", "onnx-int8-static", "onnx-std-int8-static", "onnx-int8-portable"]
    ensure(model_workspace, names, {"onnx-int4": Quantize(scheme="int4", passes=("quantize-linear",))}, quiet)
    for name, key in (("onnx-int4", "quantize-linear-int4"), ("onnx-int8-static", "quantize-linear-static")):
        assert model_workspace.load(name).manifest.facts["rewrites"][key] == architecture.linear
    for name in names:
        assert stored_bytes(model_workspace, name) < stored_bytes(
            model_workspace, "onnx-std" if "std" in name else "onnx-fp32"
        )
        weights = [i for i in graph(model_workspace, name).graph.initializers.values() if i.shape.rank() == 2]
        arrays = Counter(i.const_value.numpy().tobytes() for i in weights if i.const_value.size > 500)
        assert set(arrays.values()) == {1}


# --- ship


@pytest.fixture(scope="module")
def bundles(workspace, tmp_path_factory):
    """Returns a function: kind of model → folder with a bundle of each target, which tests must not change."""

    @functools.cache
    def ship(kind):
        folder = tmp_path_factory.mktemp(kind)
        variants_by_target = {
            "python": ("onnx-fp32", "onnx-int8"),
            "web": ("onnx-int8",),
            "other": ("onnx-std", "onnx-std-int8"),
            "mobile": ("onnx-std", "onnx-fp32", "onnx-int8"),
        }
        for target, names in variants_by_target.items():
            shipping.ship(workspace(kind), Order(names, target, demo=False), folder / target, quiet, no_bar)
        return folder

    return ship


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_bundle_gives_the_probabilities_of_transformers(bundles, workspace, kind):
    """Runs a padded batch with the tokenizer.json and the runner inside the bundle."""
    from toolchain.ship.bundle_files.classify import Classifier

    if kind not in (*DIFFERENT_ATTENTIONS, "eurobert"):
        pytest.skip(SAME_ATTENTION)
    folder = bundles(kind)
    for target in ("python", "web", "other", "mobile"):
        for report in checking.compare(folder / target, checking.read(folder / target)[0]).values():
            # The logits differ little from the bundle's reference logits, because this machine computed both.
            assert report["largest_delta"] < 1e-4
    checkpoint = workspace(kind).path("torch-fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**tokens).logits.softmax(-1).numpy()
    probabilities = Classifier(folder / "python", "onnx-fp32")(TEXTS)
    assert np.abs(np.array([list(row.values()) for row in probabilities]) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "albert"])
def test_a_bundle_verifies_itself_without_the_toolchain(bundles, kind):
    for command in (["verify.py"], ["classify.py", "a charming film"]):
        completed = subprocess.run(
            [sys.executable, *command],
            cwd=bundles(kind) / "python",
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr


# --- prune


@pytest.fixture(scope="module")
def pruned_workspace(workspace, rows):
    """Returns a function: kind of model → its workspace with the pruned, recovered, exported and quantised variants."""

    @functools.cache
    def build(kind):
        model_workspace = workspace(kind)
        steps = {"torch-pruned50-r1": Recover(1, train=rows.digest, batch_size=16)}
        ensure(model_workspace, ["torch-pruned50", "torch-pruned50-r1", "onnx-pruned50-int8"], {}, quiet)
        ensure(model_workspace, ["onnx-pruned50-r1-int8"], steps, quiet)
        return model_workspace

    return build


@pytest.mark.parametrize("kind", PRUNABLE)
def test_pruned_variants_are_smaller_and_can_be_loaded(pruned_workspace, kind):
    model_workspace = pruned_workspace(kind)
    facts = model_workspace.load("torch-pruned50").manifest.facts
    assert facts["pruning"]["achieved"] >= 0.5
    assert facts["parameters"] < model_workspace.load("torch-fp32").manifest.facts["parameters"]
    for name in ("onnx-pruned50", "onnx-pruned50-int8"):
        unpruned = {"onnx-pruned50": "onnx-fp32", "onnx-pruned50-int8": "onnx-int8"}[name]
        sizes = [
            model_workspace.load(variant).manifest.facts["bytes_by_part"]["encoder"] for variant in (name, unpruned)
        ]
        assert sizes[0] < 0.8 * sizes[1]
    for suffix in ("", "-r1"):
        assert model_workspace.load(f"onnx-pruned50{suffix}").manifest.validation["largest_delta"] <= 1e-4
        assert model_workspace.load(f"onnx-pruned50{suffix}-int8").manifest.facts["rewrites"]["quantize-linear"] > 0
    # The stored model can be loaded, with the pruned shapes and the smaller number of parameters.
    model = load_model(model_workspace.path("torch-pruned50-r1"))
    assert [shape.heads for shape in architectures.shapes_of(model)] == facts["pruning"]["heads"]
    assert [shape.ffn for shape in architectures.shapes_of(model)] == facts["pruning"]["ffn"]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]


@pytest.mark.parametrize("kind", PRUNABLE)
@pytest.mark.parametrize(("heads", "neurons"), [((0, 2), range(0, 64, 2)), ((), range(10)), ((1,), ()), ((), ())])
def test_removing_units_equals_setting_their_weights_to_zero(workspace, kind, heads, neurons):
    gated_model, pruned_model = (load_model(workspace(kind).path("torch-fp32")) for _ in range(2))
    names, layer, size = (
        architectures.layout_of(gated_model),
        architectures.layers_of(gated_model)[0],
        architectures.head_size(gated_model),
    )
    shape = architectures.shapes_of(gated_model)[0]
    with torch.no_grad():
        for head in set(range(shape.heads)) - set(heads):
            layer.get_submodule(names.output).weight[:, head * size : (head + 1) * size] = 0
        for neuron in set(range(shape.ffn)) - set(neurons):
            layer.get_submodule(names.down).weight[:, neuron] = 0
        for units, last_linear, norm in (
            (heads, names.output, names.attention_norm),
            (neurons, names.down, names.output_norm),
        ):
            if not units:  # a sub-block (attention or FFN) without units becomes the identity
                layer.get_submodule(last_linear).bias.zero_()
                layer.set_submodule(norm, torch.nn.Identity())
    architectures.keep_units(pruned_model, 0, heads, neurons)
    ids = [[2, 40, 3], [2, *range(20, 43), 3], [2]]
    for left in (False, True):
        arrays = pad(ids, ARCHITECTURES[kind].inputs, gated_model.config.pad_token_id, left)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.inference_mode():
            assert torch.allclose(pruned_model(**batch).logits, gated_model(**batch).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("albert", "AlbertForSequenceClassification uses the same weights in all layers"),
        ("deberta-v2", "DebertaV2ForSequenceClassification attends to words and to positions with the same weights"),
        ("mpnet", "MPNetForSequenceClassification has one table of position biases"),
        ("modernbert", "ModernBertForSequenceClassification computes queries, keys and values in one layer"),
        ("mobilebert", "MobileBertForSequenceClassification has bottleneck layers"),
        pytest.param(
            "eurobert",
            "EuroBertForSequenceClassification has gates in its feed-forward parts",
            marks=pytest.mark.skipif(
                "eurobert" not in ARCHITECTURES, reason="transformers 4.57 does not know EuroBERT"
            ),
        ),
    ],
)
def test_an_error_names_an_architecture_that_cannot_be_pruned(workspace, kind, message):
    with pytest.raises(PruningError, match=message):
        ensure(workspace(kind), ["torch-pruned50"], {}, quiet)


def test_longformer_is_refused_before_its_export(tmp_path, monkeypatch):
    folder = make(tmp_path / "longformer", "longformer")
    longformer = Workspace.open(str(folder), tmp_path / "exported")
    with pytest.raises(CheckpointError, match="LongformerForSequenceClassification splits a text") as error:
        ensure(longformer, ["onnx-std"], {}, quiet)
    assert "toolchain quantize --backend torch" in error.value.hint
    # An architecture outside of the table gets an error of validation.
    monkeypatch.setattr(exporters, "UNEXPORTABLE", {})
    with pytest.raises(GraphError) as caught:
        ensure(longformer, ["onnx-std"], {}, quiet)
    cause = caught.value.cause
    assert cause.startswith(
        "onnx-std cannot be validated: the graph fails on a batch of 1 × 1 tokens: the operator Reshape"
    )
    assert "\n" not in cause
    assert "ONNXRuntimeError" not in cause
    assert "onnxruntime_src" not in cause
    assert "--exporter" in caught.value.hint
    assert not longformer.path("onnx-std").exists()


# --- vocabulary and benchmark


@pytest.mark.parametrize(("kind", "names"), [("roberta", "BPE"), ("albert", "Unigram"), ("deberta-v2", "Unigram")])
def test_only_a_wordpiece_vocabulary_can_be_trimmed(workspace, kind, names):
    with pytest.raises(CheckpointError, match=f"Only WordPiece .* the type of this tokenizer is {names}"):
        ensure(workspace(kind), ["onnx-int8+trim"], {"onnx-int8+trim": Quantize(trim_vocab="train")}, quiet)


@pytest.mark.parametrize("kind", ["electra", "mobilebert"])
def test_trimming_removes_rows_of_the_real_embedding_width(workspace, kind):
    model_workspace = workspace(kind)
    ensure(model_workspace, ["onnx-int8+trim"], {"onnx-int8+trim": Quantize(trim_vocab="train")}, quiet)
    facts = model_workspace.load("onnx-int8+trim").manifest.facts
    dropped_tokens = facts["vocabulary"]["of"] - facts["vocabulary"]["kept"]
    assert dropped_tokens > 0
    assert model_workspace.load("onnx-int8").manifest.facts["parameters"] - facts["parameters"] == 16 * dropped_tokens


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
def test_the_benchmark_measures_other_architectures(workspace, kind):
    model_workspace = workspace(kind)
    cells = [
        Cell(kind, name, runtime, "cpu", model_workspace.load(name))
        for name, runtime in (("torch-fp32", "torch"), ("onnx-int8", "onnx"))
    ]
    encoder = Encoder.open(model_workspace.path("torch-fp32"), ARCHITECTURES[kind].inputs, 128)
    data = inputs.load_embedded().select(range(24))
    rows, _ = bench(cells, data, encoder, FAST, quiet)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert [row.score.count for row in rows] == [24, 24]
    assert all(row.latency_ms["p50"] > 0 for row in rows)
