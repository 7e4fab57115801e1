"""The whole chain for every architecture, on a small random model with a tokenizer of its kind."""

import functools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from tiny_architectures import ARCHITECTURES, PLAIN, PRUNABLE, TYPED, make

from toolchain import passes
from toolchain.artifacts.steps import Quantize, Recover
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
from toolchain.errors import CheckpointError, PruningError
from toolchain.models import architectures
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

TEXTS = ["a film", "an unflinchingly bleak and desperate story of nobody at all", "good"]
FAST = Protocol(passes=1, min_s=0.05, pass_s=10, starts=1, threads=1, batch_size=8)

pytestmark = pytest.mark.slow


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Training data of 60 short rows."""
    file = tmp_path_factory.mktemp("train") / "train.csv"
    words = ["good", "bad", "film", "dull", "bright", "a", "the", "story"]
    lines = [f"{' '.join(words[(i * k) % 8] for k in range(1, 4 + i % 9))},{i % 2}" for i in range(60)]
    file.write_text("sentence,label\n" + "\n".join(lines) + "\n")
    return TrainingSource(str(file))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, rows):
    """Kind → its workspace with all unpruned variants; a test may add variants, but change none."""

    @functools.cache
    def build(kind):
        folder = make(tmp_path_factory.mktemp("checkpoint") / kind, kind)
        opened = Workspace.open(str(folder), tmp_path_factory.mktemp("exported"), None, rows)
        ensure(opened, ["onnx-int8", "onnx-std-int8"], {}, quiet)
        return opened

    return build


def graph(workspace, name):
    return passes.read(workspace.path(name) / "model.onnx")


def stored_bytes(workspace, name):
    return (workspace.path(name) / "model.onnx").stat().st_size


# --- export, optimise, validate, quantise


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_stage_takes_the_models_inputs_and_agrees_with_pytorch(workspace, kind):
    opened, it = workspace(kind), ARCHITECTURES[kind]
    for name in ("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8", "onnx-std-int8"):
        manifest = opened.load(name).manifest
        assert {spec.name for spec in manifest.inputs} == set(it.inputs)
        assert manifest.max_length == 128
        assert manifest.validation["passed"]
    for name in ("onnx-std", "onnx-fp32"):
        deltas = opened.load(name).manifest.validation["grid_largest_delta"]
        assert max(deltas.values()) <= 1e-4
        assert "7 texts, left padding" in deltas
        assert "7 mixed lengths, left padding" in deltas


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_counts_of_fused_and_quantised_nodes(workspace, kind):
    opened, it = workspace(kind), ARCHITECTURES[kind]
    fp32, int8, std = (opened.load(n).manifest.facts for n in ("onnx-fp32", "onnx-int8", "onnx-std-int8"))
    narrowed = fp32["rewrites"]["first-query"]  # attentions that became MultiHeadAttention of one query
    assert narrowed == fp32["operators"].get("MultiHeadAttention", 0)
    fused = {k: n for k, n in fp32["operators"].items() if k in ("Attention", "Gelu", "FastGelu")}
    assert fused | ({"Attention": fused["Attention"] + narrowed} if narrowed else {}) == it.fused
    assert fp32["rewrites"]["fuse"] == sum(it.fused.values())
    assert int8["rewrites"]["quantize-linear"] == it.linear + narrowed
    products = ("DynamicQuantizeMatMul", "QAttention")
    assert sum(int8["operators"].get(name, 0) for name in products) == it.linear + narrowed
    # Unfused, query, key and value are layers of their own.
    assert std["operators"]["MatMulInteger"] == it.linear + 2 * it.fused.get("Attention", 0)
    assert int8["rewrites"]["quantize-embedding"] == std["rewrites"]["quantize-embedding"] == it.tables
    left = Counter(n.op_type for n in graph(opened, "onnx-int8").graph if n.op_type in ("MatMul", "Gemm"))
    assert left["Gemm"] == 1  # of the logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_int8_is_smaller_however_often_a_weight_is_used(workspace, kind):
    opened = workspace(kind)
    fp32, int8 = (opened.load(name).manifest.facts["bytes_by_dtype"] for name in ("onnx-fp32", "onnx-int8"))
    torch_fp32 = opened.load("torch-fp32").manifest.facts["bytes_by_dtype"]["float32"]
    assert fp32["float32"] <= 1.02 * torch_fp32  # nothing is copied, packed or not
    assert int8["int8"] < 0.27 * fp32["float32"]
    assert int8["float32"] < 0.25 * fp32["float32"]
    assert stored_bytes(opened, "onnx-int8") < stored_bytes(opened, "onnx-fp32")
    assert stored_bytes(opened, "onnx-std-int8") < stored_bytes(opened, "onnx-std")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padding_on_the_right_changes_no_answer(workspace, kind):
    """RoBERTa counts positions over real tokens only."""
    opened = workspace(kind)
    manifest = opened.load("onnx-fp32").manifest
    encoder = Encoder.open(opened.path("onnx-fp32"), ARCHITECTURES[kind].inputs, manifest.max_length)
    assert encoder.pad_id == (1 if kind == "roberta" else 0)
    ids = encoder.encode(TEXTS)
    session = open_session(opened.path("onnx-fp32"), "onnx", Place("cpu", 1))
    alone = np.concatenate([session.run(pad([row], encoder.names, encoder.pad_id)) for row in ids])
    together = session.run(pad(ids, encoder.names, encoder.pad_id, width=40))
    assert np.abs(together - alone).max() < 1e-4
    # Int8 is scaled by all tokens: padded ones are none of their own, unless embeddings are mixed or places relative.
    for name in ("onnx-int8", "onnx-std-int8"):
        replaced = opened.load(name).manifest.facts["rewrites"]["padding"]
        assert replaced == int(kind not in ("deberta-v2", "mobilebert"))
        session = open_session(opened.path(name), "onnx", Place("cpu", 1))
        for row in ids if replaced else []:
            own, wide = (session.run(pad([row], encoder.names, encoder.pad_id, width=width)) for width in (0, 40))
            assert np.abs(wide - own).max() < 1e-4


def test_token_types_are_an_input_only_where_they_can_differ(tmp_path):
    """Neither the tokenizer's nor the exporter's list of inputs decides."""
    make(tmp_path / "silent", "bert")
    file = tmp_path / "silent" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": list(PLAIN)}))
    make(tmp_path / "single", "bert", type_vocab_size=1)
    make(tmp_path / "talking", "roberta")
    file = tmp_path / "talking" / "tokenizer_config.json"
    body = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({**body, "model_input_names": list(TYPED)}))
    for name in ("silent", "single", "talking"):
        built = ensure(Workspace.open(str(tmp_path / name), tmp_path / "out"), ["onnx-std"], {}, quiet)["onnx-std"]
        assert {spec.name for spec in built.manifest.inputs} == set(PLAIN)


@pytest.mark.parametrize("kind", ["albert", "deberta-v2"])
def test_other_schemes_share_what_layers_share(workspace, kind):
    """Each value has its own fixed scale. A smoothed weight would need a copy per value, so shared ones stay."""
    opened, it = workspace(kind), ARCHITECTURES[kind]
    names = ["onnx-int4", "onnx-int8-static", "onnx-std-int8-static", "onnx-int8-portable"]
    ensure(opened, names, {"onnx-int4": Quantize(scheme="int4", passes=("quantize-linear",))}, quiet)
    for name, key in (("onnx-int4", "quantize-linear-int4"), ("onnx-int8-static", "quantize-linear-static")):
        assert opened.load(name).manifest.facts["rewrites"][key] == it.linear
    for name in names:
        assert stored_bytes(opened, name) < stored_bytes(opened, "onnx-std" if "std" in name else "onnx-fp32")
        weights = [i for i in graph(opened, name).graph.initializers.values() if i.shape.rank() == 2]
        arrays = Counter(i.const_value.numpy().tobytes() for i in weights if i.const_value.size > 500)
        assert set(arrays.values()) == {1}


# --- ship


@pytest.fixture(scope="module")
def bundles(workspace, tmp_path_factory):
    """Kind → a folder with a bundle of each target; not to be changed."""

    @functools.cache
    def ship(kind):
        folder = tmp_path_factory.mktemp(kind)
        wanted = {
            "python": ("onnx-fp32", "onnx-int8"),
            "web": ("onnx-int8",),
            "other": ("onnx-std", "onnx-std-int8"),
            "mobile": ("onnx-std", "onnx-fp32", "onnx-int8"),
        }
        for target, names in wanted.items():
            shipping.ship(workspace(kind), Order(names, target, demo=False), folder / target, quiet, no_bar)
        return folder

    return ship


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_bundle_answers_as_transformers_does(bundles, workspace, kind):
    """The bundle's own classifier reads its tokenizer.json and answers a padded batch."""
    from toolchain.ship.bundle_files.classify import Classifier

    folder = bundles(kind)
    for target in ("python", "web", "other", "mobile"):
        for found in shipping.verify(folder / target)["models"].values():
            assert found["largest_delta"] < 1e-4  # the machine it was made on
    checkpoint = workspace(kind).path("torch-fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        want = model(**given).logits.softmax(-1).numpy()
    got = Classifier(folder / "python", "onnx-fp32")(TEXTS)
    assert np.abs(np.array([list(each.values()) for each in got]) - want).max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "albert"])
def test_a_bundle_proves_itself_without_the_toolchain(bundles, kind):
    for command in (["verify.py"], ["classify.py", "a charming film"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=bundles(kind) / "python",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


# --- prune


@pytest.fixture(scope="module")
def pruned(workspace, rows):
    """Kind → its workspace with the model pruned by half, recovered, exported and quantised."""

    @functools.cache
    def build(kind):
        opened = workspace(kind)
        steps = {"torch-pruned50-r1": Recover(1, train=rows.digest, batch_size=16)}
        ensure(opened, ["torch-pruned50", "torch-pruned50-r1", "onnx-pruned50-int8"], {}, quiet)
        ensure(opened, ["onnx-pruned50-r1-int8"], steps, quiet)
        return opened

    return build


@pytest.mark.parametrize("kind", PRUNABLE)
def test_a_pruned_model_is_smaller_in_all_formats_and_reloads(pruned, kind):
    opened = pruned(kind)
    facts = opened.load("torch-pruned50").manifest.facts
    assert facts["pruning"]["achieved"] >= 0.5
    assert facts["parameters"] < opened.load("torch-fp32").manifest.facts["parameters"]
    for name in ("onnx-pruned50", "onnx-pruned50-int8"):
        dense = {"onnx-pruned50": "onnx-fp32", "onnx-pruned50-int8": "onnx-int8"}[name]
        sizes = [opened.load(each).manifest.facts["bytes_by_part"]["encoder"] for each in (name, dense)]
        assert sizes[0] < 0.8 * sizes[1]
    for suffix in ("", "-r1"):
        assert opened.load(f"onnx-pruned50{suffix}").manifest.validation["largest_delta"] <= 1e-4
        assert opened.load(f"onnx-pruned50{suffix}-int8").manifest.facts["rewrites"]["quantize-linear"] > 0
    # Two processes could read it: what lies there gives the recovered model's shape and finite answers.
    model = load_model(opened.path("torch-pruned50-r1"))
    assert [shape.heads for shape in architectures.shapes_of(model)] == facts["pruning"]["heads"]
    assert [shape.ffn for shape in architectures.shapes_of(model)] == facts["pruning"]["ffn"]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]


@pytest.mark.parametrize("kind", PRUNABLE)
@pytest.mark.parametrize(("heads", "neurons"), [((0, 2), range(0, 64, 2)), ((), range(10)), ((1,), ()), ((), ())])
def test_removed_units_equal_units_with_a_gate_of_zero(workspace, kind, heads, neurons):
    gated, cut = (load_model(workspace(kind).path("torch-fp32")) for _ in range(2))
    names, layer, size = (
        architectures.layout_of(gated),
        architectures.layers_of(gated)[0],
        architectures.head_size(gated),
    )
    shape = architectures.shapes_of(gated)[0]
    with torch.no_grad():
        for head in set(range(shape.heads)) - set(heads):
            layer.get_submodule(names.output).weight[:, head * size : (head + 1) * size] = 0
        for neuron in set(range(shape.ffn)) - set(neurons):
            layer.get_submodule(names.down).weight[:, neuron] = 0
        for kept, end, norm in ((heads, names.output, names.attention_norm), (neurons, names.down, names.output_norm)):
            if not kept:  # the whole sub-block goes: what enters it is what leaves it
                layer.get_submodule(end).bias.zero_()
                layer.set_submodule(norm, torch.nn.Identity())
    architectures.keep_units(cut, 0, heads, neurons)
    ids = [[2, 40, 3], [2, *range(20, 43), 3], [2]]
    for left in (False, True):
        arrays = pad(ids, ARCHITECTURES[kind].inputs, gated.config.pad_token_id, left)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.inference_mode():
            assert torch.allclose(cut(**batch).logits, gated(**batch).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("albert", "AlbertForSequenceClassification uses the same weights in all layers"),
        ("deberta-v2", "DebertaV2ForSequenceClassification uses the same weights for positions and words"),
        ("mobilebert", "MobileBertForSequenceClassification has bottleneck layers"),
    ],
)
def test_the_refusal_names_an_architecture_that_cannot_be_pruned(workspace, kind, says):
    with pytest.raises(PruningError, match=says):
        ensure(workspace(kind), ["torch-pruned50"], {}, quiet)


# --- what else depends on the tokenizer


@pytest.mark.parametrize(("kind", "names"), [("roberta", "BPE"), ("albert", "Unigram"), ("deberta-v2", "Unigram")])
def test_only_wordpiece_is_trimmed(workspace, kind, names):
    with pytest.raises(CheckpointError, match=f"Only WordPiece .* the type of this tokenizer is {names}"):
        ensure(workspace(kind), ["onnx-int8+trim"], {"onnx-int8+trim": Quantize(trim_vocab="train")}, quiet)


@pytest.mark.parametrize("kind", ["electra", "mobilebert"])
def test_a_trimmed_table_is_as_wide_as_it_is(workspace, kind):
    opened = workspace(kind)
    ensure(opened, ["onnx-int8+trim"], {"onnx-int8+trim": Quantize(trim_vocab="train")}, quiet)
    facts = opened.load("onnx-int8+trim").manifest.facts
    gone = facts["vocabulary"]["of"] - facts["vocabulary"]["kept"]
    assert gone > 0
    assert opened.load("onnx-int8").manifest.facts["parameters"] - facts["parameters"] == 16 * gone


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
def test_they_are_measured(workspace, kind):
    opened = workspace(kind)
    cells = [
        Cell(kind, name, runtime, "cpu", opened.load(name))
        for name, runtime in (("torch-fp32", "torch"), ("onnx-int8", "onnx"))
    ]
    encoder = Encoder.open(opened.path("torch-fp32"), ARCHITECTURES[kind].inputs, 128)
    data = inputs.load_embedded().select(range(24))
    measured, _ = bench(cells, data, encoder, FAST, quiet)
    assert [row.status for row in measured] == ["ok", "ok"]
    assert [row.accuracy.count for row in measured] == [24, 24]
    assert all(row.latency_ms["p50"] > 0 for row in measured)
