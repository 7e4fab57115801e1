"""Pruning really cuts, keeps what matters, reloads, and refuses what it cannot do in words."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from toolchain import pruning
from toolchain.artifacts.steps import Export, Optimize, Prune, Quantize
from toolchain.backends import Place, open_session
from toolchain.backends.pytorch import load_model, save_weights
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli import main
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import TrainingSource, hold_out
from toolchain.errors import ArtifactError, CheckpointError, DataError, PruningError
from toolchain.models import architectures
from toolchain.models.architectures import LayerShape
from toolchain.models.checkpoints import OWN_WEIGHTS
from toolchain.pruning.costs import EncoderSizes as Sizes
from toolchain.pruning.costs import LatencyTable, latency_table
from toolchain.pruning.depth import dispensable_layers
from toolchain.pruning.importance import Importance, LayerImportance, fisher, magnitude
from toolchain.pruning.least_squares import cut_and_fit
from toolchain.pruning.selection import KeptUnits, rearrange, select
from toolchain.pruning.setup import shared_setup
from toolchain.system import hardware
from toolchain.training.batches import Batch
from toolchain.tuning.settings import largest_ratio

NAMES = ("input_ids", "attention_mask")
ROWS = [[101, 2023, 102], [101, *range(2000, 2023), 102], [101]]
SIZES = Sizes(32, 8, (LayerShape(4, 64), LayerShape(4, 64)))


def quiet(*_):
    pass


def by_parameters(kind, count):
    return SIZES.unit_parameters(kind, count)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Training data of 60 rows for the tiny model."""
    file = tmp_path_factory.mktemp("train") / "train.csv"
    words = ["good", "bad", "film", "dull", "bright", "a", "the", "story"]
    rows = [f"{' '.join(words[(i * k) % 8] for k in range(1, 4 + i % 9))},{i % 2}" for i in range(60)]
    file.write_text("sentence,label\n" + "\n".join(rows) + "\n")
    return TrainingSource(str(file))


@pytest.fixture
def given_tiny(built_tiny, sentences):
    return shared_setup(built_tiny.load("torch-fp32"), sentences, 40, 20)


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, sentences, tmp_path_factory):
    """A workspace with the tiny model pruned by half, down to int8."""
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path_factory.mktemp("exported"), None, sentences)
    ensure(workspace, ["onnx-pruned50-int8", "onnx-int8"], {}, quiet)
    return workspace


def logits(model, left=False):
    with torch.inference_mode():
        batch = {
            name: torch.from_numpy(array)
            for name, array in pad([[i % 190 for i in r] for r in ROWS], NAMES, 0, left).items()
        }
        return model(**batch).logits


# --- cutting


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize(("heads", "neurons"), [((0, 2), range(0, 64, 2)), ((), range(10)), ((1,), ()), ((), ())])
def test_what_is_cut_is_what_a_gate_of_zero_would_silence(built_tiny, tmp_path, kind, heads, neurons):
    model = load_model(built_tiny.path("torch-fp32")) if kind == "distilbert" else bert()
    gated, cut = copy.deepcopy(model), copy.deepcopy(model)
    names, layer = architectures.layout_of(model), architectures.layers_of(gated)[0]
    with torch.no_grad():
        out, down = layer.get_submodule(names.output).weight, layer.get_submodule(names.down).weight
        for head in set(range(4)) - set(heads):
            out[:, head * 8 : head * 8 + 8] = 0
        for neuron in set(range(64)) - set(neurons):
            down[:, neuron] = 0
        # Of a sub-block that is gone nothing is added, and its norm is gone with it.
        for units, last, norm in (
            (heads, names.output, names.attention_norm),
            (neurons, names.down, names.output_norm),
        ):
            if not units:
                layer.get_submodule(last).bias[:] = 0
                layer.get_submodule(norm).forward = lambda states: states
    architectures.keep_units(cut, 0, heads, neurons)
    for left in (False, True):
        assert torch.allclose(logits(cut, left), logits(gated, left), atol=1e-5)
    assert architectures.shapes_of(cut) == [LayerShape(len(heads), len(neurons)), LayerShape(4, 64)]
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    # and it reloads
    cut.config.save_pretrained(tmp_path)
    save_weights(cut.state_dict(), tmp_path)
    architectures.write_shapes(cut, tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(cut))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"layers": [{"heads": 1}]}',
        '{"layers": [{"heads": -1, "ffn": 3}]}',
        '{"layers": []}',
        json.dumps({"layers": [{"heads": 9, "ffn": 64}] * 2}),
        json.dumps({"layers": [{"heads": 4, "ffn": 65}] * 2}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(built_tiny, tmp_path, content):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built_tiny.path("torch-fp32") / name).read_bytes())
    (tmp_path / architectures.SHAPES).write_text(content)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_weights_of_other_shapes_are_refused(pruned, tmp_path):
    for name in ("config.json", OWN_WEIGHTS, architectures.SHAPES):
        (tmp_path / name).write_bytes((pruned.path("torch-pruned50") / name).read_bytes())
    (tmp_path / architectures.SHAPES).write_text(json.dumps({"layers": [{"heads": 4, "ffn": 64}] * 2}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path)


def test_an_architecture_that_shares_layers_or_is_unknown_is_refused():
    from transformers import AlbertConfig, AlbertForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    with pytest.raises(PruningError, match="uses the same weights in all layers"):
        architectures.layout_of(AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **small)))
    other = XLNetForSequenceClassification(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(PruningError, match="does not support XLNet"):
        architectures.layout_of(other)


# --- choosing


def test_fisher_is_the_mean_square_of_every_sentences_own_gradient(given_tiny):
    """Against the definition: one sentence at a time, a gate nudged by a finite difference."""
    model, batch = given_tiny.model, given_tiny.ranking[0]
    found = fisher(model, [batch])[1].heads.unit_costs
    names = architectures.layout_of(model)
    weight = architectures.layers_of(model)[1].get_submodule(names.output).weight
    for head in range(4):
        losses = []
        for sign in (1, -1):
            nudged = copy.deepcopy(model).double()
            twin = architectures.layers_of(nudged)[1].get_submodule(names.output).weight
            with torch.no_grad():
                twin[:, head * 8 : head * 8 + 8] *= 1 + sign * 1e-4
                out = nudged(**batch.inputs).logits
            losses.append(torch.nn.functional.cross_entropy(out, batch.labels, reduction="none"))
        slope = (losses[0] - losses[1]) / 2e-4
        assert float(found[head]) == pytest.approx(float(slope.square().mean()), rel=1e-3, abs=1e-9)
    assert weight.requires_grad  # as it was


def test_gradients_that_are_not_finite_are_refused(given_tiny):
    broken = copy.deepcopy(given_tiny.model)
    with torch.no_grad():
        broken.classifier.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        fisher(broken, given_tiny.ranking)


def diagonal(heads, neurons):
    return LayerImportance(*(Importance(torch.diag(torch.tensor(v, dtype=torch.float64))) for v in (heads, neurons)))


@given(st.integers(1, 90), st.integers(0, 10_000))
def test_at_least_the_ratio_goes_and_what_goes_matters_least(percent, seed):
    rng = np.random.default_rng(seed)
    layers = [diagonal(rng.random(4).tolist(), rng.random(64).tolist()) for _ in range(2)]
    kept = select(layers, percent / 100, SIZES, by_parameters)
    after = Sizes(32, 8, tuple(LayerShape(len(k.heads), len(k.neurons)) for k in kept))
    assert 1 - after.parameters / SIZES.parameters >= percent / 100
    assert sum(len(k.heads) for k in kept) >= 1
    for layer, k in zip(layers, kept, strict=True):
        assert len(k.neurons) % 32 == 0
        for units, chosen in ((layer.heads, k.heads), (layer.neurons, k.neurons)):
            gone = [i for i in range(len(units.moment)) if i not in chosen]
            assert max(units.unit_costs[gone], default=0) <= min(units.unit_costs[list(chosen)], default=np.inf)


def test_layers_that_matter_less_lose_more():
    layers = [diagonal([1.0] * 4, [1.0] * 64), diagonal([0.01] * 4, [0.01] * 64)]
    first, second = select(layers, 0.4, SIZES, by_parameters)
    assert (len(first.heads), len(first.neurons)) == (4, 64)
    assert len(second.heads) < 4


@given(st.integers(0, 90), st.integers(0, 10_000))
def test_a_layer_that_goes_whole_counts(percent, seed):
    rng = np.random.default_rng(seed)
    layers = [diagonal(rng.random(4).tolist(), rng.random(64).tolist()) for _ in range(2)]
    first, second = select(layers, percent / 100, SIZES, by_parameters, [1])
    assert (second.heads, second.neurons) == ((), ())
    after = Sizes(32, 8, (LayerShape(len(first.heads), len(first.neurons)), LayerShape(0, 0)))
    assert 1 - after.parameters / SIZES.parameters >= percent / 100
    if percent <= 50:
        assert (len(first.heads), len(first.neurons)) == (4, 64)


def test_the_layers_that_go_are_those_without_which_the_loss_is_least(given_tiny):
    """Against the definition: one after the other, by letting each of the rest hand on what it is given."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(given_tiny.folder, num_hidden_layers=4)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 8  # layers that do something

    def without(gone):
        layers = architectures.layers_of(model)
        hooks = [layers[index].register_forward_hook(lambda module, args, _: (args[0],)) for index in gone]
        try:
            with torch.no_grad():
                losses = [
                    torch.nn.functional.cross_entropy(model(**b.inputs).logits, b.labels, reduction="sum")
                    for b in given_tiny.ranking
                ]
        finally:
            for hook in hooks:
                hook.remove()
        return float(sum(losses))

    gone = []
    for layers in (3, 2, 1):
        gone.append(min({1, 2, 3} - set(gone), key=lambda index: without([*gone, index])))
        assert dispensable_layers(model, layers, given_tiny.ranking) == sorted(gone)
    assert dispensable_layers(model, 4, given_tiny.ranking) == []
    for layers in (0, 5):
        with pytest.raises(PruningError, match="Keep 1 to 4 layers"):
            dispensable_layers(model, layers, given_tiny.ranking)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_the_norm_before_a_sub_block_that_is_gone_stands_in_for_its_own(built_tiny, kind):
    """Exactly where the sub-block did nothing but scale and shift."""
    model = load_model(built_tiny.path("torch-fp32")) if kind == "distilbert" else bert()
    names, layer = architectures.layout_of(model), architectures.layers_of(model)[1]
    with torch.no_grad():
        for path, norm in ((names.output, names.attention_norm), (names.down, names.output_norm)):
            layer.get_submodule(path).weight.zero_()
            layer.get_submodule(path).bias.zero_()
            layer.get_submodule(norm).weight.uniform_(0.5, 2)
            layer.get_submodule(norm).bias.uniform_(-1, 1)
    ids = torch.randint(5, 190, (16, 12), generator=torch.Generator().manual_seed(0))
    given_rows = [
        Batch(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            torch.zeros(16, dtype=torch.long),
            list(range(16)),
        )
    ]
    every = [KeptUnits(tuple(range(4)), tuple(range(64)))]
    fitted, plain = copy.deepcopy(model), copy.deepcopy(model)
    cut_and_fit(model, fitted, [*every, KeptUnits((), ())], given_rows, quiet)
    architectures.keep_units(plain, 1, (), ())
    assert architectures.shapes_of(fitted)[1].is_empty
    want, found, without = (m(**given_rows[0].inputs).logits for m in (model, fitted, plain))
    assert (found - want).abs().max() < 0.25 * (without - want).abs().max()


def test_so_much_that_nothing_is_left_is_refused():
    with pytest.raises(PruningError, match=r"would remove the entire encoder. .*highest ratio of this model is 0\."):
        select([diagonal([1.0] * 4, [1.0] * 64)] * 2, 0.99, SIZES, by_parameters)


def test_a_dear_unit_goes_before_a_cheap_one_of_the_same_importance():
    layers = [diagonal([1.0] * 4, [0.125] * 64)]
    sizes = Sizes(32, 8, (LayerShape(4, 64),))
    heads_dear = select(layers, 0.2, sizes, lambda kind, count: count * (10.0 if kind == "heads" else 0.1))
    neurons_dear = select(layers, 0.2, sizes, lambda kind, count: count * (0.1 if kind == "heads" else 10.0))
    assert len(heads_dear[0].heads) < 4
    assert len(heads_dear[0].neurons) == 64
    assert len(neurons_dear[0].heads) == 4
    assert len(neurons_dear[0].neurons) == 32


@given(st.integers(0, 10_000), st.integers(1, 7))
def test_rearranging_keeps_the_number_and_never_costs_more(seed, count):
    rows = torch.tensor(np.random.default_rng(seed).normal(size=(5, 8)))
    units = Importance(rows.T @ rows)

    def cost(kept):
        gone = torch.tensor([float(i not in kept) for i in range(8)], dtype=torch.float64)
        return float(gone @ units.moment @ gone)

    before = units.unit_costs.argsort(stable=True).tolist()[8 - count :]
    after = rearrange(units, before)
    assert len(after) == count
    assert list(after) == sorted(after)
    assert cost(after) <= cost(before) + 1e-9


def test_magnitude_ranks_by_the_weights_alone(given_tiny):
    model = copy.deepcopy(given_tiny.model)
    names, layer = architectures.layout_of(model), architectures.layers_of(model)[0]
    with torch.no_grad():
        layer.get_submodule(names.down).weight[:, 5] = 0
        layer.get_submodule(names.up).weight[5] = 0
    assert int(magnitude(model)[0].neurons.unit_costs.argmin()) == 5


# --- fitting


def test_fitting_brings_the_answers_closer_to_the_unpruned_models(given_tiny):
    model = given_tiny.model
    fitted = pruning.prune(given_tiny, 0.4, "fisher", by_parameters, quiet)
    kept = select(given_tiny.importances("fisher"), 0.4, SIZES, by_parameters)
    plain = copy.deepcopy(model)
    for index, k in enumerate(kept):
        architectures.keep_units(plain, index, k.heads, k.neurons)
    assert architectures.shapes_of(plain) == architectures.shapes_of(fitted)

    def far(other):
        with torch.inference_mode():
            return sum(
                float((other(**b.inputs).logits - model(**b.inputs).logits).square().sum()) for b in given_tiny.ranking
            )

    assert far(fitted) < 0.7 * far(plain)


def test_a_mask_makes_nothing_smaller(given_tiny):
    masked = pruning.mask(given_tiny.model, 0.5)
    assert architectures.shapes_of(masked) == architectures.shapes_of(given_tiny.model)
    names = architectures.layout_of(masked)
    for path in (names.query, names.up):
        weight = architectures.layers_of(masked)[0].get_submodule(path).weight
        assert float((weight.abs().sum(1) == 0).float().mean()) == 0.5
    assert not (given_tiny.model.distilbert.transformer.layer[0].ffn.lin1.weight == 0).any()


# --- the artifacts


def test_the_chain_of_a_pruned_model(pruned):
    dense, cut = (pruned.load(name).manifest for name in ("torch-fp32", "torch-pruned50"))
    facts = cut.facts["pruning"]
    assert facts["achieved"] >= 0.5
    assert facts["encoder_parameters"]["after"] <= facts["encoder_parameters"]["before"] / 2
    assert facts["predicted_speedup"]["value"] > 1.5
    assert len(facts["heads"]) == len(facts["ffn"]) == 2
    assert cut.facts["parameters"] < dense.facts["parameters"]
    assert cut.step.train.startswith("train.csv:")
    for name in ("onnx-std-pruned50", "onnx-pruned50", "onnx-pruned50-int8"):
        assert pruned.load(name).manifest.facts["pruning"] == facts
    for name in ("onnx-std-pruned50", "onnx-pruned50"):
        assert pruned.load(name).manifest.validation["largest_delta"] <= 1e-4
    sizes = {
        name: pruned.load(name).manifest.facts["bytes_by_part"]["encoder"]
        for name in ("onnx-int8", "onnx-pruned50-int8")
    }
    assert sizes["onnx-pruned50-int8"] < 0.75 * sizes["onnx-int8"]  # biases and norms of so small a model weigh much


def test_its_initialisers_are_smaller(pruned):
    import onnx

    def elements(name):
        graph = onnx.load(pruned.path(name) / "model.onnx").graph
        inner = [i for i in graph.initializer if len(i.dims) == 2 and max(i.dims) < 200]  # no embedding table
        return sum(i.dims[0] * i.dims[1] for i in inner)

    facts = pruned.load("torch-pruned50").manifest.facts["pruning"]
    removed = sum(4 - n for n in facts["heads"]) * 4 * 32 * 8 + sum(64 - n for n in facts["ffn"]) * 2 * 32
    for suffix in ("", "-int8"):
        dense = f"onnx{suffix}" if suffix else "onnx-fp32"
        assert elements(dense) - elements(f"onnx-pruned50{suffix}") == removed


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits(pruned, tmp_path):
    code = (
        "import sys, json; from pathlib import Path; import numpy as np\n"
        "from toolchain.backends import Place, open_session\n"
        "s = open_session(Path(sys.argv[1]), 'torch', Place('cpu', 1))\n"
        "b = {'input_ids': np.array([[101, 2023, 102]]), 'attention_mask': np.ones((1, 3), np.int64)}\n"
        "print(json.dumps(s.run(b).tolist()))"
    )
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-c", code, str(pruned.path("torch-pruned50"))], capture_output=True, text=True, check=True
    )
    here = open_session(pruned.path("onnx-pruned50"), "onnx", Place("cpu", 1)).run(pad([[101, 2023, 102]], NAMES, 0))
    assert np.abs(np.array(json.loads(run.stdout)) - here).max() < 1e-4


@pytest.mark.slow
def test_the_same_work_gives_the_same_id(pruned, tmp_path):
    again = Workspace(tmp_path, pruned.model, pruned.source, pruned.train)
    ensure(again, ["torch-pruned50"], {}, quiet)
    assert again.load("torch-pruned50").manifest.id == pruned.load("torch-pruned50").manifest.id


@pytest.mark.slow
def test_a_model_of_fewer_layers_goes_all_the_way(pruned):
    asked = {"torch-pruned50+shallow": Prune(0.5, layers=1)}
    std = "onnx-std-pruned50+shallow"
    asked |= {std: Export(), "onnx-pruned50+shallow": Optimize.for_provider("cpu")}
    asked |= {"onnx-pruned50-int8+shallow": Quantize()}
    built = ensure(pruned, list(asked), asked, quiet)
    facts = built["torch-pruned50+shallow"].manifest.facts["pruning"]
    assert (facts["heads"], facts["ffn"]) == ([4, 0], [64, 0])
    assert facts["achieved"] == 0.5
    for name in (std, "onnx-pruned50+shallow"):
        assert built[name].manifest.validation["largest_delta"] <= 1e-4
    operators = built["onnx-pruned50+shallow"].manifest.facts["operators"]
    assert (operators["LayerNormalization"], operators["Sub"]) == (3, 3)  # nothing is left of the other layer


@pytest.mark.slow
def test_a_mask_is_an_artifact_that_says_it_removed_nothing(tiny):
    built = ensure(tiny, ["torch-pruned50-mask"], {}, quiet)["torch-pruned50-mask"]
    facts = built.manifest.facts["pruning"]
    assert facts["achieved"] == 0
    assert facts["zeroed"] == pytest.approx(0.5, abs=0.02)
    assert built.manifest.size_bytes == pytest.approx(tiny.load("torch-fp32").manifest.size_bytes, rel=1e-3)


@pytest.mark.slow
def test_a_pruned_folder_can_be_brought_as_a_checkpoint_but_not_pruned_again(pruned, tmp_path):
    workspace = Workspace.open(str(pruned.path("torch-pruned50")), tmp_path, "mine", pruned.train)
    built = ensure(workspace, ["onnx-fp32"], {}, quiet)
    assert built["onnx-fp32"].manifest.validation["passed"]
    assert (workspace.path("torch-fp32") / OWN_WEIGHTS).is_file()  # transformers would load it wrongly
    with pytest.raises(PruningError, match="already pruned"):
        ensure(workspace, ["torch-pruned30"], {}, quiet)
    assert not workspace.path("torch-pruned30").exists()


def test_a_rebuild_without_its_training_data_is_refused(pruned, tmp_path, monkeypatch):
    import shutil

    from toolchain.build import pipeline

    shutil.copytree(pruned.exported, tmp_path / "exported")
    workspace = Workspace(tmp_path / "exported", pruned.model, pruned.source)
    function, version = pipeline.STEPS[Prune]
    monkeypatch.setitem(pipeline.STEPS, Prune, (function, version + 1))
    with pytest.raises(DataError, match=r"made with the training data train.csv, not with sst2"):
        ensure(workspace, ["torch-pruned50"], {}, quiet)
    workspace.load("torch-pruned50").verify()


# --- costs and search


@pytest.mark.slow
def test_a_latency_table_is_measured_once_and_only_for_this_machine(given_tiny, tmp_path, monkeypatch):
    first = latency_table(given_tiny.model, tmp_path, quiet)
    assert set(first.heads_ms) >= {0, 1, 4}
    assert set(first.neurons_ms) >= {0, 32, 64}
    assert first.heads_ms[0] == first.neurons_ms[0] == 0
    monkeypatch.setattr("toolchain.pruning.costs._measure", lambda *_: pytest.fail("measured twice"))
    assert latency_table(given_tiny.model, tmp_path, quiet) == first
    file = next(tmp_path.glob("latency-*.json"))
    good = file.read_text()
    file.write_text(good.replace(hardware.machine()["id"], "another"))
    with pytest.raises(PruningError, match=r"measured on another machine \(another\). Delete .* to measure again"):
        latency_table(given_tiny.model, tmp_path, quiet)
    assert "another" in file.read_text()  # left as it was
    file.write_text(good[:40])
    with pytest.raises(PruningError, match="is not a valid latency table"):
        latency_table(given_tiny.model, tmp_path, quiet)


def test_a_price_between_two_counts_lies_between_theirs():
    table = LatencyTable(1.0, {0: 0.0, 4: 2.0}, {0: 0.0, 64: 1.0})
    assert table.price("heads", 2) == 1.0
    assert table.sentence_ms([LayerShape(4, 64), LayerShape(0, 32)]) == 1 + 2 + 1 + 0.5


def test_the_largest_ratio_is_searched_on_held_out_rows(tiny, sentences):
    from toolchain.progress import no_bar

    workspace = Workspace(tiny.exported, tiny.model, tiny.source, sentences)
    said = []
    ratio = largest_ratio(workspace, Prune(0.5), 100.0, lambda event: said.append(str(event)), no_bar)
    assert ratio in pruning.SEARCH_RATIOS
    assert any("points lost on held-out rows" in line for line in said)
    with pytest.raises(PruningError, match="Even the smallest ratio"):
        largest_ratio(workspace, Prune(0.5), -200.0, lambda event: said.append(str(event)), no_bar)


@given(st.integers(20, 400))
def test_held_out_rows_are_never_trained_on(count):
    from toolchain.data.inputs import Data

    data = Data("d", tuple(f"w{'x ' * (i % 30)}" for i in range(count)), tuple(i % 2 for i in range(count)))
    trained, held = hold_out(data)
    assert sorted([*trained, *held]) == list(range(count))
    assert len(held) == count // 10
    assert hold_out(data) == (trained, held)


def test_too_few_rows_are_refused(tmp_path):
    from toolchain.data.inputs import Data

    with pytest.raises(DataError, match="3 rows, which are too few"):
        hold_out(Data("d", ("a", "b", "c"), (0, 1, 0)))


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "--ratio"),
        (("--ratio", "0.3", "--max-drop", "1"), 2, "--max-drop"),
        (("--ratio", "0"), 2, "is not 0.01 to 0.99"),
        (("--ratio", "1"), 2, "is not 0.01 to 0.99"),
        (("--ratio", "-0.5"), 2, "is not 0.01 to 0.99"),
        (("--ratio", "0.333"), 2, "whole per cent from"),
        (("--ratio", "nan"), 2, "is not 0.01 to 0.99"),
        (("--ratio", "0.3", "--method", "mask", "--recover", "1"), 2, "removes nothing"),
        (("--ratio", "0.3", "--method", "mask", "--layers", "1"), 2, "neither --layers"),
        (("--ratio", "0.3", "--layers", "0"), 2, "--layers"),
        (("--ratio", "0.3", "--layers", "3"), 1, "the model has 2. Keep 1 to 2 layers"),
        (("--ratio", "0.3", "--from", "torch-pruned30"), 1, "pruned already"),
        (("--ratio", "0.3", "--from", "onnx-fp32"), 1, "No variant is built from onnx-fp32"),
        (("--ratio", "0.3", "--train-data", "no-such.csv"), 1, "There is no file no-such.csv"),
        (("--ratio", "0.99", "--train-data", "train.csv"), 1, "would remove the entire encoder"),
    ],
)
def test_what_cannot_be_pruned_is_told_and_leaves_what_was_there(
    tiny, sentences, tmp_path, capsys, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text(Path(sentences.file).read_text())
    before = sorted(p.name for p in tiny.path("torch-fp32").parent.iterdir() if not p.name.startswith("."))
    assert main(["prune", *arguments, "--model", "tiny", "--exported", str(tiny.exported)]) == code
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tiny.path("torch-fp32").parent.iterdir() if not p.name.startswith(".")) == before


def test_a_model_of_other_labels_needs_training_data_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "three", ("bad", "so so", "good"))
    assert main(["prune", "--ratio", "0.5", "--model", "./three"]) == 1
    assert "Pass data with the model's labels: --train-data FILE" in capsys.readouterr().err
    assert not (tmp_path / "exported" / "three" / "torch-pruned50").exists()


@pytest.mark.slow
def test_pruning_from_the_command_line(tiny, sentences, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--model", "tiny", "--exported", tiny.exported, "--train-data", sentences.file)
    code, out, err = say("prune", "--ratio", 0.3, "--ratio", "0.5", *common)
    assert code == 0, err
    assert out.split() == [str(tiny.path(name)) for name in ("torch-pruned30", "torch-pruned50")]
    assert "of the encoder's linear parameters removed" in err
    assert "predicted" in err
    assert say("prune", "--ratio", 0.3, "--ratio", "0.5", *common)[2].count("fresh, skipped") == 3


def test_a_stored_model_that_answers_otherwise_is_an_error(tiny, sentences, monkeypatch):
    from toolchain.build.steps import prune

    def lossy(tensors, folder):
        save_weights({**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, folder)

    monkeypatch.setattr(prune, "save_weights", lossy)
    workspace = Workspace(tiny.exported, tiny.model, tiny.source, sentences)
    with pytest.raises(ArtifactError, match="gives other logits after it is stored"):
        ensure(workspace, ["torch-pruned50"], {}, quiet)
    assert not workspace.path("torch-pruned50").exists()
    assert load_file(workspace.path("torch-fp32") / "model.safetensors")
    assert Encoder.open(workspace.path("torch-fp32"), NAMES, 512)
