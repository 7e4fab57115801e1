"""A LoRA adapter merged into its base gives PEFT's answers; an adapter that does not fit is refused."""

import json
import shutil

import pytest
from conftest import make_checkpoint

from toolchain.artifacts.steps import Import
from toolchain.build.pipeline import ensure, plan, validate_variant
from toolchain.build.workspace import Workspace
from toolchain.errors import CheckpointError
from toolchain.models import adapters, checkpoints, sources
from toolchain.models.checkpoints import Source

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_lin", "v_lin"], "modules_to_save": ["pre_classifier"]}


def make_base(folder, seed=1, width=32):
    """A DistilBERT without a head, and its tokenizer."""
    from transformers import AutoModel

    make_checkpoint(folder, seed=seed, width=width)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


def make_adapter(folder, base, classes=3, **settings):
    """An adapter of `base` whose every tensor is random, as after training."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **{**LORA, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """An adapter and its base; not to be changed."""
    home = tmp_path_factory.mktemp("lora")
    base = make_base(home / "base")
    return make_adapter(home / "adapter", base), base


@pytest.fixture
def copies(pair, tmp_path):
    """An adapter and its base; a test may change them."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]


def edit(folder, name=adapters.SETTINGS, **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retensor(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / adapters.WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def answers(model):
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_lin": 2}, "alpha_pattern": {"q_lin": 3}},
        {"use_dora": True, "target_modules": ["q_lin", "lin1", "lin2"]},
        {"bias": "lora_only", "layers_to_transform": [1], "layers_pattern": "layer"},
        {"bias": "all", "target_modules": r".*attention\.(q|k)_lin"},
        {"target_modules": ["word_embeddings", "out_lin"]},
    ],
)
def test_merged_it_answers_as_peft_does_unmerged(pair, tmp_path, settings):
    from transformers import AutoModelForSequenceClassification

    from toolchain.backends import lora

    adapter = make_adapter(tmp_path / "adapter", pair[1], **settings)
    by_peft = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(pair[1], num_labels=3), adapter
    ).eval()
    expected = answers(by_peft)
    assert torch.allclose(answers(lora.load_unmerged(adapter, pair[1])), expected, atol=1e-6)
    assert torch.allclose(answers(lora.load_merged(adapter, pair[1])), expected, atol=1e-5)
    with by_peft.disable_adapter():
        assert not torch.allclose(answers(by_peft), expected, atol=1e-2)


@pytest.mark.slow
def test_it_is_imported_on_the_base_that_was_given_and_kept_until_either_changes(copies, tmp_path):
    adapter, base = copies
    workspace = Workspace.open(str(adapter), tmp_path / "exported").with_base(str(base))
    manifest = ensure(workspace, ["torch-fp32"], {}, lambda line: None)["torch-fp32"].manifest
    assert manifest.source == {
        "kind": "folder",
        "ref": str(adapter),
        "revision": manifest.step.revision,
        "base": str(base),
    }
    assert manifest.validation["passed"]
    assert manifest.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert {entry.path for entry in manifest.files} >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert not [entry.path for entry in manifest.files if "adapter" in entry.path]
    # Another command says no more than the model's name.
    for model in (str(adapter), "adapter"):
        known = Workspace.open(model, tmp_path / "exported")
        assert plan(known, ["torch-fp32"], {})[0].reason == ""
    assert validate_variant(known, "torch-fp32", lambda line: None)["passed"]
    edit(base, "config.json", dropout=0.2)
    assert plan(known, ["torch-fp32"], {})[0].reason == "the checkpoint changed"
    shutil.rmtree(base)
    assert plan(known, ["torch-fp32"], {})[0].reason == ""
    edit(adapter, lora_alpha=16)
    with pytest.raises(CheckpointError, match="There is no folder"):
        plan(known, ["torch-fp32"], {})
    shutil.rmtree(adapter)
    assert plan(Workspace.open("adapter", tmp_path / "exported"), ["torch-fp32"], {})[0].reason == ""


def test_a_place_that_the_adapter_names_is_never_followed(copies, tmp_path, say):
    adapter, base = copies
    edit(adapter, base_model_name_or_path=str(base))
    code, _, err = say("export", "--model", adapter, "--exported", tmp_path / "exported")
    assert code == 1
    assert f"names a path as its base ({base})" in err
    assert "--base" in err
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="does not name its base"):
        adapters.base(adapter)
    assert not (tmp_path / "exported" / "adapter" / "torch-fp32").exists()


def test_a_dry_run_names_the_revision_of_the_base(copies, tmp_path, say):
    adapter, base = copies
    code, out, err = say(
        "export", "--model", adapter, "--base", base, "--exported", tmp_path / "exported", "--optimize", "none",
        "--dry-run",
    )  # fmt: skip
    assert code == 0, err
    assert "torch-fp32: build (missing); revision=sha256:" in out
    assert ", base=sha256:" in out


def test_a_base_is_for_adapters(tiny_checkpoint, pair, tmp_path):
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path).with_base(str(pair[1]))
    with pytest.raises(CheckpointError, match=r"is a model, not an adapter. Run the command without --base"):
        plan(workspace, ["torch-fp32"], {})
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a base"):
        checkpoints.pin(checkpoints.locate(str(pair[0])), head=False)


def test_a_hub_base_is_pinned_by_its_commit(copies, monkeypatch):
    adapter, base = copies
    edit(adapter, base_model_name_or_path="somebody/some-base", revision="v1")
    asked = []

    def look(ref, revision):
        asked.append((ref, revision))
        return "c0ffee", frozenset({"config.json", "model.safetensors"})

    monkeypatch.setattr("toolchain.models.hub.read_revision", look)
    monkeypatch.setattr("toolchain.models.hub.download", lambda ref, revision, patterns: base)
    source = Source("folder", str(adapter))
    step = sources.pin_revisions(source, Import(), None)
    assert (step.base, asked) == ("somebody/some-base@c0ffee", [("somebody/some-base", "v1")])
    assert sources.pin_revisions(source, step, step) == step  # asks nobody again
    assert len(asked) == 1
    origin = sources.fetch_files(source, step)
    assert (origin.folder, origin.base) == (adapter, base)


@pytest.mark.slow
def test_labels_come_from_beside_the_adapter_else_from_a_base_with_as_many(copies, tmp_path):
    from toolchain.backends import lora

    adapter, base = copies
    assert lora.load_merged(adapter, base).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    names = {"0": "bad", "1": "so-so", "2": "good"}
    edit(base, "config.json", id2label=names)
    assert list(lora.load_merged(adapter, base).config.id2label.values()) == ["bad", "so-so", "good"]
    (adapter / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}, "dim": 5}))
    assert list(lora.load_merged(adapter, base).config.id2label.values()) == ["a", "b", "c"]
    (adapter / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(CheckpointError, match="names 2 classes, but the head has 3"):
        lora.load_merged(adapter, base)
    (adapter / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "b"}}))
    with pytest.raises(CheckpointError, match="id2label"):
        lora.load_merged(adapter, base)


def test_a_base_with_a_head_for_other_classes_gets_the_adapters(tiny_checkpoint, tmp_path):
    from toolchain.backends import lora

    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    assert answers(lora.load_merged(adapter, tiny_checkpoint)).shape == (2, 3)


def test_weights_that_neither_has_are_not_made_up(tmp_path):
    """A BERT saved without its pooler; PEFT would leave the pooler random."""
    from transformers import AutoModel, BertConfig, BertModel

    from toolchain.backends import lora

    base = make_base(tmp_path / "base")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**shape)).save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query"], modules_to_save=None)
    assert answers(lora.load_merged(adapter, base)).shape == (2, 3)
    AutoModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"of bert.pooler.dense.bias.*modules_to_save=\['bert.pooler.dense'\]"):
        lora.load_merged(adapter, base)


def half(adapter, base):
    """Not damage: weights of half precision."""
    retensor(adapter, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})


def another_kind(adapter, base):
    edit(adapter, peft_type="IA3")


def another_task(adapter, base):
    edit(adapter, task_type="CAUSAL_LM")


def own_code(adapter, base):
    edit(adapter, auto_mapping={"base_model_class": "Mine", "parent_library": "mine"})


def megatron(adapter, base):
    edit(adapter, megatron_config={"x": 1}, megatron_core="os")


def of_a_changed_base(adapter, base):
    edit(adapter, init_lora_weights="pissa")


def settings_of_no_kind(adapter, base):
    (adapter / adapters.SETTINGS).write_text("[1]")


def rank_of_no_kind(adapter, base):
    edit(adapter, r="four")


def rank_lies(adapter, base):
    edit(adapter, r=2)


def pickled(adapter, base):
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")


def no_weights(adapter, base):
    (adapter / adapters.WEIGHTS).unlink()


def cut_short(adapter, base):
    file = adapter / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def no_number(adapter, base):
    name = "base_model.model.classifier.bias"
    retensor(adapter, lambda tensors: {**tensors, name: tensors[name] * float("nan")})


def no_head(adapter, base):
    retensor(adapter, lambda tensors: {n: t for n, t in tensors.items() if "classifier" not in n})


def a_tensor_too_many(adapter, base):
    retensor(adapter, lambda tensors: {**tensors, "base_model.model.distilbert.more.lora_A.weight": torch.ones(2)})


def a_tensor_less(adapter, base):
    retensor(adapter, lambda tensors: dict(list(tensors.items())[3:]))


def narrower_base(adapter, base):
    shutil.rmtree(base)
    make_base(base, width=16)


def base_of_other_names(adapter, base):
    from transformers import BertConfig, BertModel

    for name in ("config.json", "model.safetensors"):
        (base / name).unlink()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**shape)).save_pretrained(base)


def quantised_base(adapter, base):
    edit(base, "config.json", quantization_config={"load_in_4bit": True})


def pickled_base(adapter, base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def model_beside(adapter, base):
    shutil.copyfile(base / "model.safetensors", adapter / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (another_kind, "has the type IA3, not LORA"),
        (another_task, "for the task CAUSAL_LM"),
        (own_code, "auto_mapping"),
        (megatron, "settings that the merge does not support: megatron_config"),
        (of_a_changed_base, "init_lora_weights='pissa'"),
        (settings_of_no_kind, "cannot be read"),
        (rank_of_no_kind, "cannot be applied to"),
        (rank_lies, "these tensors have other shapes: .*lora_"),
        (pickled, "only as pickle"),
        (no_weights, "has no adapter_model.safetensors"),
        (cut_short, "truncated"),
        (no_number, "classifier.bias contains NaN"),
        (no_head, "has no tensors for .*classifier"),
        (a_tensor_too_many, "has no parameters for .*distilbert.more"),
        (a_tensor_less, "has no tensors for"),
        (narrower_base, "these tensors have other shapes"),
        (base_of_other_names, "cannot be applied to|no parameters"),
        (quantised_base, "already quantised"),
        (pickled_base, "only as pickle"),
        (model_beside, "contains both a model and an adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(copies, tmp_path, damage, says):
    adapter, base = copies
    damage(adapter, base)
    workspace = Workspace.open(str(adapter), tmp_path / "exported").with_base(str(base))
    with pytest.raises(CheckpointError, match=says) as error:
        ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    assert error.value.hint
    assert not workspace.path("torch-fp32").exists()


def test_weights_of_half_precision_are_merged_in_full(copies):
    from toolchain.backends import lora

    adapter, base = copies
    half(adapter, base)
    model = lora.load_merged(adapter, base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_without_peft_the_error_names_the_extra(pair, monkeypatch):
    import sys

    from toolchain.backends import lora

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match="pip install 'peft>="):
        lora.load_merged(*pair)
