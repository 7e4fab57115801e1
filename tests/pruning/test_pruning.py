"""Tests of pruning: the weights it removes, the units it keeps, loading a pruned model, and its error messages."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint, write_short_rows
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


def count_parameters(kind, count):
    return SIZES.unit_parameters(kind, count)


def random_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Writes training data of 60 rows for the tiny model."""
    return TrainingSource(str(write_short_rows(tmp_path_factory.mktemp("train") / "train.csv", 60)))


@pytest.fixture
def tiny_setup(built_tiny, sentences):
    return shared_setup(built_tiny.load("torch-fp32"), sentences, 40, 20)


@pytest.fixture(scope="module")
def pruned_workspace(tiny_checkpoint, sentences, tmp_path_factory):
    """A workspace with the tiny model pruned by half, and with the ONNX and int8 variants of the pruned model."""
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path_factory.mktemp("exported"), None, sentences)
    ensure(workspace, ["onnx-pruned50-int8", "onnx-int8"], {}, quiet)
    return workspace


def logits_of(model, left=False):
    with torch.inference_mode():
        batch = {
            name: torch.from_numpy(array)
            for name, array in pad([[i % 190 for i in r] for r in ROWS], NAMES, 0, left).items()
        }
        return model(**batch).logits


# --- removing units


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize(("heads", "neurons"), [((0, 2), range(0, 64, 2)), ((), range(10)), ((1,), ()), ((), ())])
def test_removing_units_equals_setting_their_weights_to_zero(built_tiny, tmp_path, kind, heads, neurons):
    model = load_model(built_tiny.path("torch-fp32")) if kind == "distilbert" else random_bert()
    gated_model, pruned_model = copy.deepcopy(model), copy.deepcopy(model)
    names, layer = architectures.layout_of(model), architectures.layers_of(gated_model)[0]
    with torch.no_grad():
        output_weight, down_weight = layer.get_submodule(names.output).weight, layer.get_submodule(names.down).weight
        for head in set(range(4)) - set(heads):
            output_weight[:, head * 8 : head * 8 + 8] = 0
        for neuron in set(range(64)) - set(neurons):
            down_weight[:, neuron] = 0
        # A sub-block without units adds nothing to the hidden states, so pruning also removes its norm.
        for units, last_linear, norm in (
            (heads, names.output, names.attention_norm),
            (neurons, names.down, names.output_norm),
        ):
            if not units:
                layer.get_submodule(last_linear).bias[:] = 0
                layer.get_submodule(norm).forward = lambda states: states
    architectures.keep_units(pruned_model, 0, heads, neurons)
    for left in (False, True):
        assert torch.allclose(logits_of(pruned_model, left), logits_of(gated_model, left), atol=1e-5)
    assert architectures.shapes_of(pruned_model) == [LayerShape(len(heads), len(neurons)), LayerShape(4, 64)]
    assert sum(p.numel() for p in pruned_model.parameters()) < sum(p.numel() for p in model.parameters())
    # The pruned model can be stored and loaded.
    pruned_model.config.save_pretrained(tmp_path)
    save_weights(pruned_model.state_dict(), tmp_path)
    architectures.write_shapes(pruned_model, tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(pruned_model))


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
def test_layer_shapes_that_do_not_fit_are_refused(built_tiny, tmp_path, content):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built_tiny.path("torch-fp32") / name).read_bytes())
    (tmp_path / architectures.SHAPES).write_text(content)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


@pytest.mark.slow
def test_weights_that_do_not_fit_the_layer_shapes_are_refused(pruned_workspace, tmp_path):
    for name in ("config.json", OWN_WEIGHTS, architectures.SHAPES):
        (tmp_path / name).write_bytes((pruned_workspace.path("torch-pruned50") / name).read_bytes())
    (tmp_path / architectures.SHAPES).write_text(json.dumps({"layers": [{"heads": 4, "ffn": 64}] * 2}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path)


def test_an_unknown_architecture_or_one_with_shared_layers_is_refused():
    from transformers import AlbertConfig, AlbertForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    with pytest.raises(PruningError, match="uses the same weights in all layers"):
        architectures.layout_of(AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **settings)))
    unknown_model = XLNetForSequenceClassification(
        XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)
    )
    with pytest.raises(PruningError, match="does not support XLNet"):
        architectures.layout_of(unknown_model)


# --- selecting units


def test_fisher_is_the_mean_squared_gradient_of_single_sentences(tiny_setup):
    """Compares `fisher` with finite differences: how each sentence's loss changes if the output of a head is scaled."""
    model, batch = tiny_setup.model, tiny_setup.ranking[0]
    unit_costs = fisher(model, [batch])[1].heads.unit_costs
    names = architectures.layout_of(model)
    weight = architectures.layers_of(model)[1].get_submodule(names.output).weight
    for head in range(4):
        losses = []
        for sign in (1, -1):
            changed_model = copy.deepcopy(model).double()
            changed_weight = architectures.layers_of(changed_model)[1].get_submodule(names.output).weight
            with torch.no_grad():
                changed_weight[:, head * 8 : head * 8 + 8] *= 1 + sign * 1e-4
                model_logits = changed_model(**batch.inputs).logits
            losses.append(torch.nn.functional.cross_entropy(model_logits, batch.labels, reduction="none"))
        slope = (losses[0] - losses[1]) / 2e-4
        assert float(unit_costs[head]) == pytest.approx(float(slope.square().mean()), rel=1e-3, abs=1e-9)
    assert weight.requires_grad  # `fisher` must restore `requires_grad`


def test_gradients_that_are_not_finite_are_refused(tiny_setup):
    broken_model = copy.deepcopy(tiny_setup.model)
    with torch.no_grad():
        broken_model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        fisher(broken_model, tiny_setup.ranking)


def diagonal_importance(heads, neurons):
    return LayerImportance(*(Importance(torch.diag(torch.tensor(v, dtype=torch.float64))) for v in (heads, neurons)))


@given(st.integers(1, 90), st.integers(0, 10_000))
def test_select_removes_at_least_the_ratio_and_the_least_important_units(percent, seed):
    rng = np.random.default_rng(seed)
    layers = [diagonal_importance(rng.random(4).tolist(), rng.random(64).tolist()) for _ in range(2)]
    kept_units = select(layers, percent / 100, SIZES, count_parameters)
    sizes_after = Sizes(32, 8, tuple(LayerShape(len(k.heads), len(k.neurons)) for k in kept_units))
    assert 1 - sizes_after.parameters / SIZES.parameters >= percent / 100
    assert sum(len(k.heads) for k in kept_units) >= 1
    for layer, k in zip(layers, kept_units, strict=True):
        assert len(k.neurons) % 32 == 0
        for units, kept_indices in ((layer.heads, k.heads), (layer.neurons, k.neurons)):
            removed_indices = [i for i in range(len(units.moment)) if i not in kept_indices]
            assert max(units.unit_costs[removed_indices], default=0) <= min(
                units.unit_costs[list(kept_indices)], default=np.inf
            )


def test_select_removes_more_from_less_important_layers():
    layers = [diagonal_importance([1.0] * 4, [1.0] * 64), diagonal_importance([0.01] * 4, [0.01] * 64)]
    first, second = select(layers, 0.4, SIZES, count_parameters)
    assert (len(first.heads), len(first.neurons)) == (4, 64)
    assert len(second.heads) < 4


@given(st.integers(0, 90), st.integers(0, 10_000))
def test_whole_removed_layers_count_towards_the_ratio(percent, seed):
    rng = np.random.default_rng(seed)
    layers = [diagonal_importance(rng.random(4).tolist(), rng.random(64).tolist()) for _ in range(2)]
    first, second = select(layers, percent / 100, SIZES, count_parameters, [1])
    assert (second.heads, second.neurons) == ((), ())
    sizes_after = Sizes(32, 8, (LayerShape(len(first.heads), len(first.neurons)), LayerShape(0, 0)))
    assert 1 - sizes_after.parameters / SIZES.parameters >= percent / 100
    if percent <= 50:
        assert (len(first.heads), len(first.neurons)) == (4, 64)


def test_dispensable_layers_are_those_whose_absence_raises_the_loss_least(tiny_setup):
    """Compares the layers that `dispensable_layers` returns with the layers that a greedy search removes.

    Each step of the greedy search removes the layer whose absence gives the lowest loss. To remove a layer, the test
    adds a hook that makes the layer return its input.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_setup.folder, num_hidden_layers=4)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 8  # with larger weights, each layer changes its input more

    def loss_without(removed_layers):
        def return_input(module, args, output):
            return (args[0],) if isinstance(output, tuple) else args[0]  # layers of transformers 4 return a tuple

        layers = architectures.layers_of(model)
        hooks = [layers[index].register_forward_hook(return_input) for index in removed_layers]
        try:
            with torch.no_grad():
                losses = [
                    torch.nn.functional.cross_entropy(model(**b.inputs).logits, b.labels, reduction="sum")
                    for b in tiny_setup.ranking
                ]
        finally:
            for hook in hooks:
                hook.remove()
        return float(sum(losses))

    removed_layers = []
    for layers in (3, 2, 1):
        removed_layers.append(
            min({1, 2, 3} - set(removed_layers), key=lambda index: loss_without([*removed_layers, index]))
        )
        assert dispensable_layers(model, layers, tiny_setup.ranking) == sorted(removed_layers)
    assert dispensable_layers(model, 4, tiny_setup.ranking) == []
    for layers in (0, 5):
        with pytest.raises(PruningError, match="Keep 1 to 4 layers"):
            dispensable_layers(model, layers, tiny_setup.ranking)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_the_norm_before_a_removed_sub_block_is_refitted_to_match(built_tiny, kind):
    """The refit of the norm is exact if the removed sub-block only scales and shifts its input."""
    model = load_model(built_tiny.path("torch-fp32")) if kind == "distilbert" else random_bert()
    names, layer = architectures.layout_of(model), architectures.layers_of(model)[1]
    with torch.no_grad():
        for path, norm in ((names.output, names.attention_norm), (names.down, names.output_norm)):
            layer.get_submodule(path).weight.zero_()
            layer.get_submodule(path).bias.zero_()
            layer.get_submodule(norm).weight.uniform_(0.5, 2)
            layer.get_submodule(norm).bias.uniform_(-1, 1)
    ids = torch.randint(5, 190, (16, 12), generator=torch.Generator().manual_seed(0))
    batches = [
        Batch(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            torch.zeros(16, dtype=torch.long),
            list(range(16)),
        )
    ]
    all_units = [KeptUnits(tuple(range(4)), tuple(range(64)))]
    fitted_model, unfitted_model = copy.deepcopy(model), copy.deepcopy(model)
    cut_and_fit(model, fitted_model, [*all_units, KeptUnits((), ())], batches, quiet)
    architectures.keep_units(unfitted_model, 1, (), ())
    assert architectures.shapes_of(fitted_model)[1].is_empty
    logits_before, fitted_logits, unfitted_logits = (
        m(**batches[0].inputs).logits for m in (model, fitted_model, unfitted_model)
    )
    assert (fitted_logits - logits_before).abs().max() < 0.25 * (unfitted_logits - logits_before).abs().max()


def test_a_ratio_that_removes_the_entire_encoder_is_refused():
    with pytest.raises(PruningError, match=r"would remove the entire encoder. .*highest ratio of this model is 0\."):
        select([diagonal_importance([1.0] * 4, [1.0] * 64)] * 2, 0.99, SIZES, count_parameters)


def test_of_equally_important_units_the_costly_one_is_removed_first():
    layers = [diagonal_importance([1.0] * 4, [0.125] * 64)]
    sizes = Sizes(32, 8, (LayerShape(4, 64),))
    costly_heads = select(layers, 0.2, sizes, lambda kind, count: count * (10.0 if kind == "heads" else 0.1))
    costly_neurons = select(layers, 0.2, sizes, lambda kind, count: count * (0.1 if kind == "heads" else 10.0))
    assert len(costly_heads[0].heads) < 4
    assert len(costly_heads[0].neurons) == 64
    assert len(costly_neurons[0].heads) == 4
    assert len(costly_neurons[0].neurons) == 32


@given(st.integers(0, 10_000), st.integers(1, 7))
def test_rearrange_keeps_the_number_of_units_and_does_not_raise_the_cost(seed, count):
    rows = torch.tensor(np.random.default_rng(seed).normal(size=(5, 8)))
    units = Importance(rows.T @ rows)

    def cost(kept_indices):
        removed_flags = torch.tensor([float(i not in kept_indices) for i in range(8)], dtype=torch.float64)
        return float(removed_flags @ units.moment @ removed_flags)

    kept_before = units.unit_costs.argsort(stable=True).tolist()[8 - count :]
    kept_after = rearrange(units, kept_before)
    assert len(kept_after) == count
    assert list(kept_after) == sorted(kept_after)
    assert cost(kept_after) <= cost(kept_before) + 1e-9


def test_magnitude_ranks_units_by_their_weights(tiny_setup):
    model = copy.deepcopy(tiny_setup.model)
    names, layer = architectures.layout_of(model), architectures.layers_of(model)[0]
    with torch.no_grad():
        layer.get_submodule(names.down).weight[:, 5] = 0
        layer.get_submodule(names.up).weight[5] = 0
    assert int(magnitude(model)[0].neurons.unit_costs.argmin()) == 5


# --- fitting


def test_fitting_brings_the_logits_closer_to_the_unpruned_models(tiny_setup):
    model = tiny_setup.model
    fitted_model = pruning.prune(tiny_setup, 0.4, "fisher", count_parameters, quiet)
    kept_units = select(tiny_setup.importances("fisher"), 0.4, SIZES, count_parameters)
    unfitted_model = copy.deepcopy(model)
    for index, k in enumerate(kept_units):
        architectures.keep_units(unfitted_model, index, k.heads, k.neurons)
    assert architectures.shapes_of(unfitted_model) == architectures.shapes_of(fitted_model)

    def squared_distance(pruned_model):
        with torch.inference_mode():
            return sum(
                float((pruned_model(**b.inputs).logits - model(**b.inputs).logits).square().sum())
                for b in tiny_setup.ranking
            )

    assert squared_distance(fitted_model) < 0.7 * squared_distance(unfitted_model)


def test_a_mask_sets_weights_to_zero_and_keeps_the_shapes(tiny_setup):
    masked_model = pruning.mask(tiny_setup.model, 0.5)
    assert architectures.shapes_of(masked_model) == architectures.shapes_of(tiny_setup.model)
    names = architectures.layout_of(masked_model)
    for path in (names.query, names.up):
        weight = architectures.layers_of(masked_model)[0].get_submodule(path).weight
        assert float((weight.abs().sum(1) == 0).float().mean()) == 0.5
    assert not (tiny_setup.model.distilbert.transformer.layer[0].ffn.lin1.weight == 0).any()


# --- the artifacts


@pytest.mark.slow
def test_variants_of_a_pruned_model_keep_its_facts_and_are_smaller(pruned_workspace):
    unpruned, pruned_manifest = (pruned_workspace.load(name).manifest for name in ("torch-fp32", "torch-pruned50"))
    facts = pruned_manifest.facts["pruning"]
    assert facts["achieved"] >= 0.5
    assert facts["encoder_parameters"]["after"] <= facts["encoder_parameters"]["before"] / 2
    assert facts["predicted_speedup"]["value"] > 1.5
    assert len(facts["heads"]) == len(facts["ffn"]) == 2
    assert pruned_manifest.facts["parameters"] < unpruned.facts["parameters"]
    assert pruned_manifest.step.train.startswith("train.csv:")
    for name in ("onnx-std-pruned50", "onnx-pruned50", "onnx-pruned50-int8"):
        assert pruned_workspace.load(name).manifest.facts["pruning"] == facts
    for name in ("onnx-std-pruned50", "onnx-pruned50"):
        assert pruned_workspace.load(name).manifest.validation["largest_delta"] <= 1e-4
    sizes = {
        name: pruned_workspace.load(name).manifest.facts["bytes_by_part"]["encoder"]
        for name in ("onnx-int8", "onnx-pruned50-int8")
    }
    # pruning keeps norms and output biases, which are a large part of this small model
    assert sizes["onnx-pruned50-int8"] < 0.75 * sizes["onnx-int8"]


@pytest.mark.slow
def test_the_initialisers_of_a_pruned_graph_are_smaller(pruned_workspace):
    import onnx

    def count_elements(name):
        graph = onnx.load(pruned_workspace.path(name) / "model.onnx").graph
        # embedding tables have more than 200 rows, so `matrices` does not contain them
        matrices = [i for i in graph.initializer if len(i.dims) == 2 and max(i.dims) < 200]
        return sum(i.dims[0] * i.dims[1] for i in matrices)

    facts = pruned_workspace.load("torch-pruned50").manifest.facts["pruning"]
    removed_elements = sum(4 - n for n in facts["heads"]) * 4 * 32 * 8 + sum(64 - n for n in facts["ffn"]) * 2 * 32
    for suffix in ("", "-int8"):
        unpruned = f"onnx{suffix}" if suffix else "onnx-fp32"
        assert count_elements(unpruned) - count_elements(f"onnx-pruned50{suffix}") == removed_elements


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits(pruned_workspace, tmp_path):
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
        [sys.executable, "-c", code, str(pruned_workspace.path("torch-pruned50"))],
        capture_output=True,
        text=True,
        check=True,
    )
    logits_here = open_session(pruned_workspace.path("onnx-pruned50"), "onnx", Place("cpu", 1)).run(
        pad([[101, 2023, 102]], NAMES, 0)
    )
    assert np.abs(np.array(json.loads(run.stdout)) - logits_here).max() < 1e-4


@pytest.mark.slow
def test_the_same_inputs_give_the_same_id(pruned_workspace, tmp_path):
    second_workspace = Workspace(tmp_path, pruned_workspace.model, pruned_workspace.source, pruned_workspace.train)
    ensure(second_workspace, ["torch-pruned50"], {}, quiet)
    assert second_workspace.load("torch-pruned50").manifest.id == pruned_workspace.load("torch-pruned50").manifest.id


@pytest.mark.slow
def test_a_model_of_fewer_layers_can_be_exported_and_quantised(pruned_workspace):
    steps = {"torch-pruned50+shallow": Prune(0.5, layers=1)}
    std_name = "onnx-std-pruned50+shallow"
    steps |= {std_name: Export(), "onnx-pruned50+shallow": Optimize.for_provider("cpu")}
    steps |= {"onnx-pruned50-int8+shallow": Quantize()}
    artifacts = ensure(pruned_workspace, list(steps), steps, quiet)
    facts = artifacts["torch-pruned50+shallow"].manifest.facts["pruning"]
    assert (facts["heads"], facts["ffn"]) == ([4, 0], [64, 0])
    assert facts["achieved"] == 0.5
    for name in (std_name, "onnx-pruned50+shallow"):
        assert artifacts[name].manifest.validation["largest_delta"] <= 1e-4
    operators = artifacts["onnx-pruned50+shallow"].manifest.facts["operators"]
    assert (operators["LayerNormalization"], operators["Sub"]) == (3, 3)  # no node of the removed layer remains


@pytest.mark.slow
def test_the_address_of_a_weight_does_not_fail_the_check_of_a_stored_model(tmp_path):
    # With weights of this width, x86 processors compute other last bits if an address is not a multiple of 64 bytes.
    checkpoint = make_checkpoint(tmp_path / "wide", width=64, leaning=30)
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    assert ensure(workspace, ["torch-pruned50-mask"], {}, quiet)


def test_the_manifest_of_a_mask_states_that_it_removed_nothing(tiny):
    artifact = ensure(tiny, ["torch-pruned50-mask"], {}, quiet)["torch-pruned50-mask"]
    facts = artifact.manifest.facts["pruning"]
    assert facts["achieved"] == 0
    assert facts["zeroed"] == pytest.approx(0.5, abs=0.02)
    assert artifact.manifest.size_bytes == pytest.approx(tiny.load("torch-fp32").manifest.size_bytes, rel=1e-3)


@pytest.mark.slow
def test_a_pruned_folder_can_be_imported_but_not_pruned_again(pruned_workspace, tmp_path):
    workspace = Workspace.open(str(pruned_workspace.path("torch-pruned50")), tmp_path, "mine", pruned_workspace.train)
    artifacts = ensure(workspace, ["onnx-fp32"], {}, quiet)
    assert artifacts["onnx-fp32"].manifest.validation["passed"]
    # transformers must not find the pruned weights, since it would load them wrongly
    assert (workspace.path("torch-fp32") / OWN_WEIGHTS).is_file()
    with pytest.raises(PruningError, match="already pruned"):
        ensure(workspace, ["torch-pruned30"], {}, quiet)
    assert not workspace.path("torch-pruned30").exists()


@pytest.mark.slow
def test_a_rebuild_without_its_training_data_is_refused(pruned_workspace, tmp_path, monkeypatch):
    import shutil

    from toolchain.build import pipeline

    shutil.copytree(pruned_workspace.exported, tmp_path / "exported")
    workspace = Workspace(tmp_path / "exported", pruned_workspace.model, pruned_workspace.source)
    function, version = pipeline.STEPS[Prune]
    monkeypatch.setitem(pipeline.STEPS, Prune, (function, version + 1))
    with pytest.raises(DataError, match=r"The training data of \S+ is train\.csv, but this command uses sst2"):
        ensure(workspace, ["torch-pruned50"], {}, quiet)
    workspace.load("torch-pruned50").verify()


# --- costs, search and held-out rows


@pytest.mark.slow
def test_a_latency_table_is_measured_once_and_refused_on_another_machine(tiny_setup, tmp_path):
    table = latency_table(tiny_setup.model, tmp_path, quiet)
    assert set(table.heads_ms) >= {0, 1, 4}
    assert set(table.neurons_ms) >= {0, 32, 64}
    assert table.heads_ms[0] == table.neurons_ms[0] == 0
    assert latency_table(tiny_setup.model, tmp_path, lambda *_: pytest.fail("measured twice"))
    assert latency_table(tiny_setup.model, tmp_path, quiet) == table
    file = next(tmp_path.glob("latency-*.json"))
    valid_text = file.read_text()
    file.write_text(valid_text.replace(hardware.machine()["id"], "machine-2"))
    with pytest.raises(PruningError, match=r"measured on another machine \(machine-2\). Delete .* to measure again"):
        latency_table(tiny_setup.model, tmp_path, quiet)
    assert "machine-2" in file.read_text()  # the refused latency table is not overwritten
    file.write_text(valid_text[:40])
    with pytest.raises(PruningError, match="is not a valid latency table"):
        latency_table(tiny_setup.model, tmp_path, quiet)


def test_the_price_of_a_count_is_interpolated():
    table = LatencyTable(1.0, {0: 0.0, 4: 2.0}, {0: 0.0, 64: 1.0})
    assert table.price("heads", 2) == 1.0
    assert table.sentence_ms([LayerShape(4, 64), LayerShape(0, 32)]) == 1 + 2 + 1 + 0.5


def test_largest_ratio_searches_on_held_out_rows(tiny, sentences):
    from toolchain.progress import no_bar

    workspace = Workspace(tiny.exported, tiny.model, tiny.source, sentences)
    lines = []
    ratio = largest_ratio(workspace, Prune(0.5), 100.0, lambda event: lines.append(str(event)), no_bar)
    assert ratio in pruning.SEARCH_RATIOS
    assert any("points on held-out rows" in line for line in lines)
    with pytest.raises(PruningError, match="Even at the smallest ratio"):
        largest_ratio(workspace, Prune(0.5), -200.0, lambda event: lines.append(str(event)), no_bar)


@given(st.integers(20, 400))
def test_held_out_rows_are_no_training_rows(count):
    from toolchain.data.inputs import Data

    data = Data("d", tuple(f"w{'x ' * (i % 30)}" for i in range(count)), tuple(i % 2 for i in range(count)))
    training_rows, held_out_rows = hold_out(data)
    assert sorted([*training_rows, *held_out_rows]) == list(range(count))
    assert len(held_out_rows) == count // 10
    assert hold_out(data) == (training_rows, held_out_rows)


def test_too_few_rows_are_refused(tmp_path):
    from toolchain.data.inputs import Data

    with pytest.raises(DataError, match="3 rows, which are too few"):
        hold_out(Data("d", ("a", "b", "c"), (0, 1, 0)))


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--ratio"),
        (("--ratio", "0.3", "--max-drop", "1"), 2, "--max-drop"),
        (("--ratio", "0"), 2, "is not a multiple of 0.01"),
        (("--ratio", "1"), 2, "is not a multiple of 0.01"),
        (("--ratio", "-0.5"), 2, "is not a multiple of 0.01"),
        (("--ratio", "0.333"), 2, "multiple of 0.01 from"),
        (("--ratio", "nan"), 2, "is not a multiple of 0.01"),
        (("--ratio", "0.3", "--method", "mask", "--recover", "1"), 2, "removes nothing"),
        (("--ratio", "0.3", "--method", "mask", "--layers", "1"), 2, "Leave --layers, --cost and --embedding-rank out"),
        (("--ratio", "0.3", "--layers", "0"), 2, "--layers"),
        (("--ratio", "0.3", "--layers", "3"), 1, "the model has 2. Keep 1 to 2 layers"),
        (("--ratio", "0.3", "--from", "torch-pruned30"), 1, "prune torch-fp32 at a higher ratio"),
        (("--ratio", "0.3", "--from", "onnx-fp32"), 1, "The step prune cannot build a variant from onnx-fp32"),
        (("--ratio", "0.3", "--train-data", "no-such.csv"), 1, "There is no file no-such.csv"),
        (("--ratio", "0.99", "--train-data", "train.csv"), 1, "would remove the entire encoder"),
    ],
)
def test_a_model_that_cannot_be_pruned_gives_an_error_and_changes_no_file(
    tiny, sentences, tmp_path, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text(Path(sentences.file).read_text())
    names_before = sorted(p.name for p in tiny.path("torch-fp32").parent.iterdir() if not p.name.startswith("."))
    assert main(["prune", *arguments, "--model", "tiny", "--exported", str(tiny.exported)]) == code
    assert message in capsys.readouterr().err
    assert (
        sorted(p.name for p in tiny.path("torch-fp32").parent.iterdir() if not p.name.startswith(".")) == names_before
    )


def test_a_model_of_other_labels_needs_its_own_training_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "three", ("bad", "so so", "good"))
    assert main(["prune", "--ratio", "0.5", "--model", "./three"]) == 1
    assert "Pass data with the model's labels: --train-data FILE" in capsys.readouterr().err
    assert not (tmp_path / "exported" / "three" / "torch-pruned50").exists()


@pytest.mark.slow
def test_the_command_prunes_by_several_ratios(tiny, sentences, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common_options = ("--model", "tiny", "--exported", tiny.exported, "--train-data", sentences.file)
    code, out, err = say("prune", "--ratio", 0.3, "--ratio", "0.5", *common_options)
    assert code == 0, err
    assert out.split() == [str(tiny.path(name)) for name in ("torch-pruned30", "torch-pruned50")]
    assert "of the encoder's linear parameters" in err
    assert "predicted" in err
    assert say("prune", "--ratio", 0.3, "--ratio", "0.5", *common_options)[2].count("fresh, skipped") == 3


def test_a_stored_model_with_other_logits_raises_an_artifact_error(tiny, sentences, monkeypatch):
    from toolchain.build.steps import prune

    def save_changed_weights(tensors, folder):
        save_weights({**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, folder)

    monkeypatch.setattr(prune, "save_weights", save_changed_weights)
    workspace = Workspace(tiny.exported, tiny.model, tiny.source, sentences)
    with pytest.raises(ArtifactError, match="stored model gives other logits"):
        ensure(workspace, ["torch-pruned50"], {}, quiet)
    assert not workspace.path("torch-pruned50").exists()
    assert load_file(workspace.path("torch-fp32") / "model.safetensors")
    assert Encoder.open(workspace.path("torch-fp32"), NAMES, 512)
