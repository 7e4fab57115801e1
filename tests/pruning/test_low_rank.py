"""Tests of word embeddings of low rank: the factors, loading them, every later step, and error messages."""

import copy
import json
import shutil
import tomllib

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from conftest import make_checkpoint, write_short_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES, make

import toolchain as tc
from toolchain import passes
from toolchain.artifacts.fact_summaries import summarize_pruning
from toolchain.artifacts.steps import CPU_PASSES, QUANTIZE_PASSES, Prune, Quantize, Recover, decode_step, settings_of
from toolchain.backends import Place, open_session
from toolchain.backends.ort import OrtSession
from toolchain.backends.pytorch import load_model, save_weights
from toolchain.bench.roofline import read_work, weight_bytes
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli import main
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import TrainingSource
from toolchain.errors import CheckpointError, PruningError, SettingsError
from toolchain.exporters import to_onnx
from toolchain.models import architectures
from toolchain.models.low_rank import LowRankEmbedding
from toolchain.passes.exits import hidden_states
from toolchain.pruning.low_rank import factor, factor_embedding
from toolchain.pruning.setup import shared_setup
from toolchain.recipes import record
from toolchain.recipes.json_schema import recipe_schema
from toolchain.results.facts import PruningFact
from toolchain.system.decoding import convert

NAMES = ("input_ids", "attention_mask")
ROWS = [[101, 2023, 102], [101, *range(2000, 2023), 102], [101]]
WIDTH, RANK = 64, 32
TOKENS = 30522  # of the reference model's tokenizer
PRUNED = Prune(0.5, embedding_rank=RANK)


def quiet(*_):
    pass


def logits_of(model, rows=ROWS, names=NAMES):
    batch = pad(rows, names, model.config.pad_token_id)
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Training data of 60 rows."""
    return TrainingSource(str(write_short_rows(tmp_path_factory.mktemp("train") / "train.csv", 60)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, sentences):
    """A workspace with a pruned model of low-rank embeddings, and with its variants in ONNX."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", width=WIDTH, leaning=30)
    workspace = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), None, sentences)
    ensure(workspace, ["onnx-pruned50-int8", "onnx-pruned50-int4"], {"torch-pruned50": PRUNED}, quiet)
    return workspace


def arrays_of(path):
    return {array.name: onnx.numpy_helper.to_array(array) for array in onnx.load(path).graph.initializer}


# --- the factors


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_the_factors_have_the_least_weighted_error(tokens, width, rank, seed):
    """Compares the error with the smallest possible one, which follows from the singular values (Eckart and Young)."""
    rank = min(rank, width)
    rng = np.random.default_rng(seed)
    table, weights = rng.normal(size=(tokens, width)), rng.integers(1, 100, tokens)
    rows, basis, mean = factor(torch.tensor(table), torch.tensor(weights), rank)
    assert (rows.shape, basis.shape, mean.shape) == ((tokens, rank), (width, rank), (width,))
    error = (weights[:, None] * (table - (rows @ basis.T + mean).numpy()) ** 2).sum()
    weighted_mean = (weights[:, None] * table).sum(0) / weights.sum()
    values = np.linalg.svd(np.sqrt(weights)[:, None] * (table - weighted_mean), compute_uv=False)
    assert error == pytest.approx((values[rank:] ** 2).sum(), rel=1e-6, abs=1e-8)
    assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=basis.dtype), atol=1e-9)


def test_with_the_full_width_the_model_gives_the_same_logits(built_tiny):
    model = load_model(built_tiny.path("torch-fp32"))
    factored = copy.deepcopy(model)
    table = model.get_input_embeddings()
    embedding = LowRankEmbedding(TOKENS, 32, 32)
    rows, basis, mean = factor(table.weight.detach(), torch.ones(TOKENS), 32)
    embedding.load_state_dict({"embedding.weight": rows, "linear.weight": basis, "linear.bias": mean})
    factored.set_input_embeddings(embedding)
    assert torch.allclose(logits_of(factored), logits_of(model), atol=1e-4)


def test_frequent_tokens_keep_more_of_their_meaning(built_tiny):
    model = load_model(built_tiny.path("torch-fp32"))
    table, ids = model.get_input_embeddings().weight.detach(), torch.arange(2000, 2020)
    errors = []
    for counts in ({}, dict.fromkeys(ids.tolist(), 100_000)):
        factored = copy.deepcopy(model)
        factor_embedding(factored, 20, counts)
        errors.append((factored.get_input_embeddings()(ids) - table[ids]).square().mean().item())
    assert errors[1] < 0.1 * errors[0]


def test_the_counts_are_those_of_the_training_rows_without_the_held_out_rows(workspace, sentences):
    setup = shared_setup(workspace.load("torch-fp32"), sentences, 40, 20)
    encoder = Encoder.open(workspace.path("torch-fp32"), NAMES, 512)
    good, cls, absent = (encoder.tokenizer.token_to_id(token) for token in ("good", "[CLS]", "river"))
    assert setup.token_counts[cls] == 54  # of 60 rows, 6 are held out
    assert setup.token_counts[good] > 54
    assert setup.token_counts[absent] == 0


# --- storing and loading


def test_the_stored_model_has_the_narrow_table_and_its_facts(workspace):
    manifest, folder = workspace.load("torch-pruned50").manifest, workspace.path("torch-pruned50")
    model = load_model(folder)
    assert architectures.embedding_rank_of(model) == RANK
    assert json.loads((folder / architectures.SHAPES).read_text())["embedding_rank"] == RANK
    facts = manifest.facts["pruning"]
    assert (facts["embedding_rank"], facts["embedding_parameters"]) == (
        RANK,
        {"before": TOKENS * WIDTH, "after": (TOKENS + WIDTH) * RANK + WIDTH},
    )
    assert sum(p.numel() for p in model.parameters()) == manifest.facts["parameters"]
    assert "Word embeddings of rank 32 have 1.0 million parameters instead of 2.0 million." in summarize_pruning(facts)
    assert workspace.load("onnx-pruned50-int8").manifest.facts["pruning"] == facts


def test_the_linear_layer_counts_as_work_and_the_table_does_not(workspace):
    folder = workspace.path("torch-pruned50")
    facts = workspace.load("torch-pruned50").manifest.facts
    encoder_weights = [
        tensor
        for name, tensor in load_file(folder / "toolchain.safetensors").items()
        if ".transformer." in name or ".word_embeddings.linear." in name
    ]
    assert facts["bytes_by_part"]["encoder"] == 4 * sum(tensor.numel() for tensor in encoder_weights)
    assert weight_bytes(facts) < 4 * TOKENS * RANK
    work = read_work(folder)
    assert work.linear_parameters == sum(tensor.numel() for tensor in encoder_weights if tensor.ndim == 2)
    assert work.macs_before_exit(0, 10) == 10 * WIDTH * RANK
    before, after = (facts["pruning"]["macs_per_sentence"][key] for key in ("before", "after"))
    layer_macs = 25 * (work.linear_parameters - WIDTH * RANK)
    assert after == layer_macs + 25 * WIDTH * RANK + 2 * 25**2 * sum(work.attention_widths)
    assert facts["pruning"]["predicted_speedup"]["value"] == round(before / after, 3)


def test_a_pruned_model_without_a_rank_keeps_its_file_and_its_settings(built_tiny, tmp_path):
    model = load_model(built_tiny.path("torch-fp32"))
    architectures.write_shapes(model, tmp_path)
    assert json.loads((tmp_path / architectures.SHAPES).read_text()) == {"layers": [{"heads": 4, "ffn": 64}] * 2}
    assert architectures.read_shapes(tmp_path).embedding_rank is None
    assert "embedding_rank" not in settings_of(Prune(0.5))
    assert decode_step("prune", settings_of(PRUNED)) == PRUNED


@pytest.mark.parametrize("rank", [0, -1, 32, 33, 10**9, 2**70, True, "4", 1.5, [4]])
def test_a_stored_rank_that_does_not_fit_is_refused(built_tiny, tmp_path, rank):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built_tiny.path("torch-fp32") / name).read_bytes())
    content = {"layers": [{"heads": 4, "ffn": 64}] * 2, "embedding_rank": rank}
    (tmp_path / architectures.SHAPES).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=architectures.SHAPES):
        load_model(tmp_path)


def test_weights_of_another_rank_are_refused(workspace, tmp_path):
    for path in workspace.path("torch-pruned50").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    shapes = json.loads((tmp_path / architectures.SHAPES).read_text())
    (tmp_path / architectures.SHAPES).write_text(json.dumps({**shapes, "embedding_rank": RANK - 1}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_folder_with_narrow_embeddings_can_be_imported(workspace, tmp_path):
    imported = Workspace.open(str(workspace.path("torch-pruned50")), tmp_path, "mine")
    ensure(imported, ["torch-fp32"], {}, quiet)
    models = [load_model(path) for path in (imported.path("torch-fp32"), workspace.path("torch-pruned50"))]
    assert torch.allclose(*map(logits_of, models), atol=1e-6)


# --- later steps


def test_onnx_variants_agree_and_the_int8_graph_reads_a_narrow_table(workspace):
    for name in ("onnx-std-pruned50", "onnx-pruned50"):
        assert workspace.load(name).manifest.validation["largest_delta"] <= 1e-4
    facts = workspace.load("onnx-pruned50-int8").manifest.facts
    assert facts["rewrites"]["padding"] == 1
    tables = arrays_of(workspace.path("onnx-pruned50-int8") / "model.onnx").values()
    assert (TOKENS, RANK) in {array.shape for array in tables if array.dtype == np.int8}
    # The linear layer of the embeddings stays fp32, because padding must not change its scale.
    assert (RANK, WIDTH) in {array.shape for array in tables if array.dtype == np.float32}
    fp32, int8 = (
        open_session(workspace.path(name), "onnx", Place("cpu", 1)) for name in ("onnx-pruned50", "onnx-pruned50-int8")
    )
    for row in ROWS:
        unpadded, padded = (int8.run(pad([row], NAMES, 0, width=width)) for width in (0, 40))
        assert np.abs(padded - unpadded).max() < 1e-5
        assert np.abs(unpadded - fp32.run(pad([row], NAMES, 0))).max() < 1


def test_the_int4_graph_stores_blocks_of_the_table_and_of_the_linear_layer(workspace):
    arrays = arrays_of(workspace.path("onnx-pruned50-int4") / "model.onnx").values()
    shapes = {array.shape for array in arrays if array.dtype == np.uint8}
    assert (TOKENS, RANK // 2) in shapes  # two codes are one byte
    assert (WIDTH, 1, RANK // 2) in shapes
    assert workspace.load("onnx-pruned50-int4").manifest.validation["passed"]


def test_static_and_standard_graphs_keep_the_linear_layer_in_fp32(workspace):
    names = ["onnx-pruned50-int8-static", "onnx-std-pruned50-int8", "onnx-std-pruned50-int8-static"]
    ensure(workspace, names, {}, quiet)
    for name in names:
        arrays = arrays_of(workspace.path(name) / "model.onnx").values()
        assert next(array for array in arrays if array.shape == (RANK, WIDTH)).dtype == np.float32
        assert workspace.load(name).manifest.validation["passed"]


def test_pytorch_variants_with_fewer_bits_can_be_built(workspace):
    for name in ("torch-pruned50-int8", "torch-pruned50-bf16"):
        artifact = ensure(workspace, [name], {}, quiet)[name]
        assert artifact.manifest.validation["passed"]
        session = open_session(artifact.path, "torch", Place("cpu", 1))
        assert (
            np.abs(
                session.run(pad(ROWS, NAMES, 0)) - logits_of(load_model(workspace.path("torch-pruned50"))).numpy()
            ).max()
            < 1
        )


def test_a_trimmed_vocabulary_keeps_narrow_rows(workspace):
    artifact = ensure(
        workspace, ["onnx-pruned50-int8+few"], {"onnx-pruned50-int8+few": Quantize(trim_vocab="train")}, quiet
    )["onnx-pruned50-int8+few"]
    facts = artifact.manifest.facts
    kept = facts["vocabulary"]["kept"]
    arrays = arrays_of(artifact.path / "model.onnx").values()
    assert (kept, RANK) in {array.shape for array in arrays if array.dtype == np.int8}
    parameters = workspace.load("onnx-pruned50").manifest.facts["parameters"]
    assert facts["parameters"] == parameters - RANK * (facts["vocabulary"]["of"] - kept)


def test_exits_find_the_hidden_states_after_the_linear_layer(workspace):
    plain = passes.read(workspace.path("onnx-pruned50") / "model.onnx")
    states = hidden_states(plain)
    heads = workspace.load("torch-pruned50").manifest.facts["pruning"]["heads"]
    assert len(states) == sum(count > 0 for count in heads)
    assert states[0].producer().op_type == "LayerNormalization"


def test_recovery_trains_both_factors(workspace, sentences):
    steps = {"torch-pruned50-r2": Recover(2, train=sentences.digest, batch_size=16, learning_rate=1e-3)}
    artifact = ensure(workspace, ["torch-pruned50-r2"], steps, quiet)["torch-pruned50-r2"]
    assert artifact.manifest.facts["recovery"]["best_epoch"] > 0
    before, after = (
        load_model(path).get_input_embeddings() for path in (workspace.path("torch-pruned50"), artifact.path)
    )
    assert not torch.equal(before.linear.weight, after.linear.weight)
    changed = (before.embedding.weight != after.embedding.weight).any(dim=1)
    # Sparse Adam changes only the rows of the tokens in the training rows.
    assert 8 <= int(changed.sum()) < 30


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "electra"])
def test_each_architecture_can_be_stored_exported_and_quantised(tmp_path, kind):
    architecture = ARCHITECTURES[kind]
    plain = load_model(make(tmp_path / kind, kind))
    narrow = copy.deepcopy(plain)
    factor_embedding(narrow, 8, {5: 100})
    assert narrow.get_input_embeddings().embedding.padding_idx == plain.get_input_embeddings().padding_idx
    stored = tmp_path / "stored"
    stored.mkdir()
    narrow.config.save_pretrained(stored)
    architectures.write_shapes(narrow, stored)
    save_weights(narrow.state_dict(), stored)
    rows = [[2, 40, 3], [2, *range(20, 43), 3]]
    expected = logits_of(narrow, rows, architecture.inputs)
    assert torch.allclose(logits_of(load_model(stored), rows, architecture.inputs), expected, atol=1e-6)
    counts = []
    for name, model in (("plain", plain), ("narrow", narrow)):
        file = tmp_path / name / "model.onnx"
        file.parent.mkdir()
        to_onnx(model, file, 18, architecture.inputs)
        context = passes.Context(model.config.num_attention_heads, model.config.hidden_size)
        graph, fused = passes.rewrite(passes.read(file), CPU_PASSES, context)
        counts.append(fused | passes.rewrite(graph, QUANTIZE_PASSES["dynamic"], context)[1])
    assert counts[0] == counts[1]  # every pass finds the same patterns as in the graph with a plain table
    batch = pad(rows, architecture.inputs, narrow.config.pad_token_id)
    assert np.abs(OrtSession(file.parent, Place("cpu", 1)).run(batch) - expected.numpy()).max() < 1e-4
    # A rank of 8 is no multiple of a block of 4-bit codes, so the table becomes int8.
    graph, _ = passes.rewrite(passes.read(file), ["quantize-embedding-int4"], context)
    tables = [value.const_value.numpy() for value in graph.graph.initializers.values()]
    assert (narrow.config.vocab_size, 8) in {table.shape for table in tables if table.dtype == np.int8}


# --- refusals


def test_a_rank_that_saves_nothing_is_refused(built_tiny):
    model = load_model(built_tiny.path("torch-fp32"))
    for rank in (32, 64):
        with pytest.raises(PruningError, match=r"does not make this model smaller.*from 1 to 31"):
            factor_embedding(model, rank, {})
    factor_embedding(model, 31, {})
    with pytest.raises(PruningError, match="has no plain table of word embeddings"):
        factor_embedding(model, 8, {})


@pytest.mark.parametrize("settings", [{"embedding_rank": 0}, {"embedding_rank": -4}])
def test_the_step_refuses_a_rank_below_1(settings):
    with pytest.raises(SettingsError, match="is not a positive number"):
        Prune(0.5, **settings)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--ratio", "0.3", "--embedding-rank", "0"), 2, "--embedding-rank"),
        (("--ratio", "0.3", "--embedding-rank", "4", "--method", "mask"), 2, "removes nothing"),
        (("--ratio", "0.3", "--embedding-rank", "32"), 1, "Give --embedding-rank a number from 1 to 31"),
        (("--max-drop", "1", "--embedding-rank", "32"), 1, "Give --embedding-rank a number from 1 to 31"),
    ],
)
def test_the_command_refuses_a_wrong_rank_and_builds_nothing(tiny, sentences, capsys, arguments, code, message):
    options = ("--model", "tiny", "--exported", str(tiny.exported), "--train-data", sentences.file)
    assert main(["prune", *arguments, *options]) == code
    assert message in capsys.readouterr().err
    assert not list(tiny.exported.glob("tiny/torch-pruned*"))


def test_the_command_the_interface_and_a_recipe_build_the_same_variant(tiny, sentences, say, tmp_path):
    options = ("--model", "tiny", "--exported", tiny.exported, "--train-data", sentences.file)
    code, out, err = say("prune", "--ratio", "0.3", "--embedding-rank", "16", "--name", "narrow", *options)
    assert code == 0, err
    assert out.strip().endswith("torch-pruned30+narrow")
    assert "Word embeddings of rank 16 have 0.5 million parameters instead of 1.0 million." in err
    model = tc.open("tiny", exported=tiny.exported, train_data=sentences.file)
    built_id = tiny.load("torch-pruned30+narrow").manifest.id
    assert model.prune(0.3, embedding_rank=16, name="narrow").id == built_id
    code, text, err = say("recipe", "torch-pruned30+narrow", "--model", "tiny", "--exported", tiny.exported)
    assert code == 0, err
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(tomllib.loads(text))
    (tmp_path / "recipe.toml").write_text(text)
    assert [v for v in record.read(tmp_path / "recipe.toml").variants if v.settings.get("embedding_rank") == 16]


def test_facts_with_a_rank_need_the_numbers_of_parameters():
    facts = {"method": "fisher", "achieved": 0.5, "heads": [1], "ffn": [1]}
    facts |= {"encoder_parameters": {"before": 2, "after": 1}, "predicted_speedup": {"value": 2.0, "by": "x"}}
    assert convert(PruningFact, facts)
    with pytest.raises(ValueError, match="belong together"):
        convert(PruningFact, {**facts, "embedding_rank": 4})
