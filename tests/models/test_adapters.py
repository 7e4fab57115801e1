"""Tests of LoRA adapters: a merged adapter gives PEFT's logits, and damaged adapters are refused."""

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
    """Saves a DistilBERT without a head, and its tokenizer."""
    from transformers import AutoModel

    make_checkpoint(folder, seed=seed, width=width)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


def make_adapter(folder, base, classes=3, **settings):
    """Saves an adapter of `base` with random tensors, as if it had been trained."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **{**LORA, **settings}))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    peft_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A LoRA adapter and its base model, which tests must not change."""
    parent = tmp_path_factory.mktemp("lora")
    base = make_base(parent / "base")
    return make_adapter(parent / "adapter", base), base


@pytest.fixture
def copies(pair, tmp_path):
    """Copies of an adapter and its base, which a test may change."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]


def edit(folder, name=adapters.SETTINGS, **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / adapters.WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def logits_of(model):
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
def test_a_merged_adapter_gives_the_logits_of_peft(pair, tmp_path, settings):
    from transformers import AutoModelForSequenceClassification

    from toolchain.backends import lora

    adapter = make_adapter(tmp_path / "adapter", pair[1], **settings)
    peft_model = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(pair[1], num_labels=3), adapter
    ).eval()
    expected = logits_of(peft_model)
    assert torch.allclose(logits_of(lora.load_unmerged(adapter, pair[1])), expected, atol=1e-6)
    assert torch.allclose(logits_of(lora.load_merged(adapter, pair[1])), expected, atol=1e-5)
    with peft_model.disable_adapter():
        assert not torch.allclose(logits_of(peft_model), expected, atol=1e-2)


@pytest.mark.slow
def test_an_imported_adapter_stays_fresh_until_it_or_its_base_changes(copies, tmp_path):
    adapter, base = copies
    workspace = Workspace.open(str(adapter), tmp_path / "exported").with_base(str(base))
    manifest = ensure(workspace, ["torch-fp32"], {}, lambda line: None)["torch-fp32"].manifest
    assert manifest.source == {
        "kind": "folder",
        "ref": adapter.name,
        "revision": manifest.step.revision,
        "base": f"./{base.name}",
    }
    assert manifest.validation["passed"]
    assert manifest.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert {entry.path for entry in manifest.files} >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert not [entry.path for entry in manifest.files if "adapter" in entry.path]
    # Later commands need only the path of the adapter or the model's name, without the base.
    for model in (str(adapter), "adapter"):
        reopened = Workspace.open(model, tmp_path / "exported")
        assert plan(reopened, ["torch-fp32"], {})[0].reason == ""
    assert validate_variant(reopened, "torch-fp32", lambda line: None)["passed"]
    edit(base, "config.json", dropout=0.2)
    assert plan(reopened, ["torch-fp32"], {})[0].reason == "the checkpoint changed"
    shutil.rmtree(base)
    assert plan(reopened, ["torch-fp32"], {})[0].reason == ""
    edit(adapter, lora_alpha=16)
    with pytest.raises(CheckpointError, match="There is no folder"):
        plan(reopened, ["torch-fp32"], {})
    shutil.rmtree(adapter)
    assert plan(Workspace.open("adapter", tmp_path / "exported"), ["torch-fp32"], {})[0].reason == ""


def test_a_base_path_in_an_adapter_config_is_not_followed(copies, tmp_path, say):
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


def test_a_dry_run_states_the_base(copies, tmp_path, say):
    adapter, base = copies
    code, out, err = say(
        "export", "--model", adapter, "--base", base, "--exported", tmp_path / "exported", "--optimize", "none",
        "--dry-run",
    )  # fmt: skip
    assert code == 0, err
    assert "torch-fp32: build (missing); revision=sha256:" in out
    assert ", base=sha256:" in out


def test_base_is_refused_for_a_model_and_an_adapter_is_refused_as_a_base(tiny_checkpoint, pair, tmp_path):
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path).with_base(str(pair[1]))
    with pytest.raises(CheckpointError, match=r"is a model, not an adapter. Run the command without --base"):
        plan(workspace, ["torch-fp32"], {})
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a base"):
        checkpoints.pin(checkpoints.locate(str(pair[0])), head=False)


def test_a_hub_base_is_pinned_to_its_commit(copies, monkeypatch):
    adapter, base = copies
    edit(adapter, base_model_name_or_path="somebody/some-base", revision="v1")
    lookups = []

    def read_revision(ref, revision):
        lookups.append((ref, revision))
        return "c0ffee", frozenset({"config.json", "model.safetensors"})

    monkeypatch.setattr("toolchain.models.hub.read_revision", read_revision)
    monkeypatch.setattr("toolchain.models.hub.download", lambda ref, revision, patterns: base)
    source = Source("folder", str(adapter))
    step = sources.pin_revisions(source, Import(), None)
    assert (step.base, lookups) == ("somebody/some-base@c0ffee", [("somebody/some-base", "v1")])
    assert sources.pin_revisions(source, step, step) == step  # no new look-up
    assert len(lookups) == 1
    origin = sources.fetch_files(source, step)
    assert (origin.folder, origin.base) == (adapter, base)


@pytest.mark.slow
def test_labels_come_from_the_adapter_or_else_from_a_base_with_the_same_number(copies, tmp_path):
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


def test_a_base_with_another_number_of_classes_gets_the_head_of_the_adapter(tiny_checkpoint, tmp_path):
    from toolchain.backends import lora

    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    assert logits_of(lora.load_merged(adapter, tiny_checkpoint)).shape == (2, 3)


def test_weights_missing_in_adapter_and_base_are_refused(tmp_path):
    """Uses a BERT saved without its pooler, whose weights PEFT would leave random."""
    from transformers import AutoModel, BertConfig, BertModel

    from toolchain.backends import lora

    base = make_base(tmp_path / "base")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**shape)).save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query"], modules_to_save=None)
    assert logits_of(lora.load_merged(adapter, base)).shape == (2, 3)
    AutoModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"of bert.pooler.dense.bias.*modules_to_save=\['bert.pooler.dense'\]"):
        lora.load_merged(adapter, base)


def store_in_half_precision(adapter, base):
    """Stores the adapter in half precision, which is valid."""
    edit_tensors(adapter, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})


def change_adapter_type(adapter, base):
    edit(adapter, peft_type="IA3")


def change_task(adapter, base):
    edit(adapter, task_type="CAUSAL_LM")


def name_custom_code(adapter, base):
    edit(adapter, auto_mapping={"base_model_class": "Mine", "parent_library": "mine"})


def add_megatron_settings(adapter, base):
    edit(adapter, megatron_config={"x": 1}, megatron_core="os")


def require_changed_base(adapter, base):
    edit(adapter, init_lora_weights="pissa")


def break_settings(adapter, base):
    (adapter / adapters.SETTINGS).write_text("[1]")


def set_text_as_rank(adapter, base):
    edit(adapter, r="four")


def set_wrong_rank(adapter, base):
    edit(adapter, r=2)


def rename_to_pickle(adapter, base):
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")


def remove_weights(adapter, base):
    (adapter / adapters.WEIGHTS).unlink()


def truncate_weights(adapter, base):
    file = adapter / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def set_nan(adapter, base):
    name = "base_model.model.classifier.bias"
    edit_tensors(adapter, lambda tensors: {**tensors, name: tensors[name] * float("nan")})


def remove_head(adapter, base):
    edit_tensors(adapter, lambda tensors: {n: t for n, t in tensors.items() if "classifier" not in n})


def add_unknown_tensor(adapter, base):
    edit_tensors(adapter, lambda tensors: {**tensors, "base_model.model.distilbert.more.lora_A.weight": torch.ones(2)})


def remove_tensors(adapter, base):
    edit_tensors(adapter, lambda tensors: dict(list(tensors.items())[3:]))


def replace_by_narrower_base(adapter, base):
    shutil.rmtree(base)
    make_base(base, width=16)


def replace_by_bert_base(adapter, base):
    from transformers import BertConfig, BertModel

    for name in ("config.json", "model.safetensors"):
        (base / name).unlink()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**shape)).save_pretrained(base)


def mark_base_as_quantised(adapter, base):
    edit(base, "config.json", quantization_config={"load_in_4bit": True})


def rename_base_to_pickle(adapter, base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def add_model_to_adapter(adapter, base):
    shutil.copyfile(base / "model.safetensors", adapter / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_adapter_type, "has the type IA3, not LORA"),
        (change_task, "for the task CAUSAL_LM"),
        (name_custom_code, "auto_mapping"),
        (add_megatron_settings, "settings that the merge does not support: megatron_config"),
        (require_changed_base, "init_lora_weights='pissa'"),
        (break_settings, "cannot be read"),
        (set_text_as_rank, "cannot be applied to"),
        (set_wrong_rank, "the shapes of these tensors differ: .*lora_"),
        (rename_to_pickle, "only as pickle"),
        (remove_weights, "has no adapter_model.safetensors"),
        (truncate_weights, "truncated"),
        (set_nan, "classifier.bias contains NaN"),
        (remove_head, "has no tensors for .*classifier"),
        (add_unknown_tensor, "has no parameters for .*distilbert.more"),
        (remove_tensors, "has no tensors for"),
        (replace_by_narrower_base, "the shapes of these tensors differ"),
        (replace_by_bert_base, "cannot be applied to|no parameters"),
        (mark_base_as_quantised, "already quantised"),
        (rename_base_to_pickle, "only as pickle"),
        (add_model_to_adapter, "contains both a model and an adapter"),
    ],
)
def test_a_damaged_adapter_or_base_is_refused_and_nothing_is_written(copies, tmp_path, damage, message):
    adapter, base = copies
    damage(adapter, base)
    workspace = Workspace.open(str(adapter), tmp_path / "exported").with_base(str(base))
    with pytest.raises(CheckpointError, match=message) as error:
        ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    assert error.value.hint
    assert not workspace.path("torch-fp32").exists()


def test_weights_in_half_precision_are_merged_in_float32(copies):
    from toolchain.backends import lora

    adapter, base = copies
    store_in_half_precision(adapter, base)
    model = lora.load_merged(adapter, base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_without_peft_an_error_names_the_extra(pair, monkeypatch):
    import sys

    from toolchain.backends import lora

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match="pip install 'peft>="):
        lora.load_merged(*pair)
