"""Tests of the sources of checkpoints, and of unsafe or damaged checkpoints, which are refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import import_job

from toolchain.backends.pytorch import load_model
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.errors import CheckpointError, HubError
from toolchain.models import checkpoints
from toolchain.models.checkpoints import check, fetch, resolve
from toolchain.models.locations import Source


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_the_reference_is_embedded(tmp_path):
    slug, source = resolve("reference", tmp_path)
    folder, pinned = fetch(source)
    assert (slug, source.kind) == ("reference", "embedded")
    assert folder == checkpoints.REFERENCE
    assert pinned.revision.startswith("sha256:")


def test_the_revision_of_a_folder_depends_on_its_content(checkpoint, tmp_path):
    slug, source = resolve(str(checkpoint), tmp_path)
    revision = fetch(source)[1].revision
    assert slug == "tiny"
    assert fetch(source)[1].revision == revision
    edit_config(checkpoint, dropout=0.2)
    assert fetch(source)[1].revision != revision


def test_the_name_of_an_exported_model_can_replace_its_source(built_tiny):
    assert resolve("tiny", built_tiny.exported)[1].same_origin(built_tiny.source)


def test_a_name_that_belongs_to_another_source_is_refused(built_tiny, checkpoint):
    with pytest.raises(CheckpointError, match="--as NAME"):
        resolve(str(checkpoint), built_tiny.exported)
    assert resolve(str(checkpoint), built_tiny.exported, "other")[0] == "other"


def test_another_model_cannot_have_the_name_reference(checkpoint, tmp_path):
    folder = checkpoint.rename(checkpoint.with_name("reference"))
    with pytest.raises(CheckpointError, match="'reference' is the name of the model inside the toolchain package"):
        resolve(str(folder), tmp_path)


@pytest.mark.parametrize("slug", ["../up", "a/b", ".hidden", "UPPER"])
def test_a_model_name_must_be_a_valid_folder_name(checkpoint, tmp_path, slug):
    with pytest.raises(CheckpointError, match="is not a valid folder name"):
        resolve(str(checkpoint), tmp_path, slug)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "~/nowhere", "a b", "a/b/c"])
def test_a_missing_path_is_not_looked_up_on_the_hub(model, tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        resolve(model, tmp_path)


def test_a_file_is_refused_as_a_checkpoint(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(checkpoint / "config.json"), tmp_path)


def test_an_unreachable_hub_gives_an_error_with_an_alternative(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    slug, source = resolve("somebody/some-Model", tmp_path)
    assert (slug, source) == ("some-model", Source("hub", "somebody/some-Model"))
    with pytest.raises(HubError, match="--model PATH"):
        fetch(source)


@pytest.mark.parametrize(
    ("error_name", "message"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "private"), ("RevisionNotFoundError", "revision 'v9'")],
)
def test_each_refusal_of_the_hub_has_its_own_message(monkeypatch, error_name, message):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        # The class of HTTP responses differs between releases of huggingface_hub, so this test uses a simple object.
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise getattr(errors, error_name)("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=message):
        fetch(Source("hub", "a/b"), "v9")


def test_only_safe_files_are_downloaded_from_the_hub(monkeypatch, checkpoint):
    import huggingface_hub

    request = {}

    def download(ref, **options):
        request.update(options, ref=ref)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, source = fetch(Source("hub", "a/b"), "main")
    assert source.revision == checkpoint.name  # the hub library names the snapshot's folder after its commit
    assert not [p for p in request["allow_patterns"] if p.endswith((".bin", ".py", ".pt", "*"))]
    assert request["revision"] == "main"


def test_a_revision_is_refused_for_a_folder(checkpoint):
    with pytest.raises(CheckpointError, match="--revision is for hub models only"):
        fetch(Source("folder", str(checkpoint)), "main")


def remove_head(folder):
    edit_config(folder, architectures=["DistilBertModel"])


def remove_architecture(folder):
    edit_config(folder, architectures=None)


def remove_config(folder):
    (folder / "config.json").unlink()


def write_list_as_config(folder):
    (folder / "config.json").write_text("[1]")


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def write_pickle_as_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04 pickle")


def rename_to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_tokenizer(folder):
    for name in checkpoints.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def change_task_to_regression(folder):
    edit_config(folder, problem_type="regression")


def number_labels_from_one(folder):
    edit_config(folder, id2label={"1": "a", "2": "b"})


def set_number_as_labels(folder):
    edit_config(folder, id2label=5)


def set_label_with_control_character(folder):
    edit_config(folder, id2label={"0": "a", "1": "b\x1b[2J"})


def set_equal_labels(folder):
    edit_config(folder, id2label={"0": "same", "1": "same"})


def change_task_to_tagging(folder):
    edit_config(folder, problem_type="tagging")


def mark_as_quantised(folder):
    edit_config(folder, quantization_config={"load_in_8bit": True})


def set_number_as_architecture(folder):
    edit_config(folder, architectures=5)


def replace_config_by_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def write_list_as_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def name_shard_outside_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def name_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_head, "no classification head"),
        (remove_architecture, "its architecture is not stated"),
        (remove_config, "has no config.json"),
        (write_list_as_config, "does not contain a JSON object"),
        (remove_weights, "has no model.safetensors"),
        (truncate_weights, "truncated"),
        (write_pickle_as_safetensors, "not a safetensors file"),
        (rename_to_pickle, "only as pickle"),
        (remove_tokenizer, "has no tokenizer"),
        (change_task_to_regression, "predicts 2 scores for each text"),
        (name_shard_outside_folder, "outside its folder"),
        (number_labels_from_one, "id2label"),
        (set_number_as_labels, "id2label"),
        (set_equal_labels, "id2label"),
        (set_label_with_control_character, "a name in id2label cannot be shown"),
        (change_task_to_tagging, "the problem_type .tagging. of config.json is unknown"),
        (mark_as_quantised, "already quantised"),
        (set_number_as_architecture, "no classification head"),
        (replace_config_by_folder, "does not contain a JSON object"),
        (write_list_as_index, "cannot be read"),
        (name_missing_shard, "is missing"),
    ],
)
def test_a_damaged_checkpoint_gives_an_error_with_a_hint(checkpoint, damage, message):
    check(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        check(checkpoint)
    assert error.value.hint


def test_an_untrained_head_is_refused(checkpoint):
    from safetensors.numpy import load_file, save_file

    from toolchain.backends.pytorch import load_model

    tensors = load_file(checkpoint / "model.safetensors")
    tensors_without_head = {name: value for name, value in tensors.items() if "classifier" not in name}
    save_file(tensors_without_head, checkpoint / "model.safetensors", metadata={"format": "pt"})
    check(checkpoint)  # the config and the file list are valid; only the weights show that the head is missing
    with pytest.raises(CheckpointError, match=r"no weights for classifier.bias.*is untrained"):
        load_model(checkpoint)


def test_a_model_type_that_transformers_does_not_know_is_refused(checkpoint):
    from toolchain.backends.pytorch import load_model

    edit_config(checkpoint, model_type="bert-of-next-year")
    with pytest.raises(CheckpointError, match=r"model type 'bert-of-next-year', which transformers \S+ does not know"):
        load_model(checkpoint)


def test_unknown_settings_of_a_newer_release_are_ignored(checkpoint, tmp_path):
    import torch

    from toolchain.build.steps.importing import import_checkpoint

    expected = load_model(checkpoint).state_dict()
    settings = {"transformers_version": "99.0.0", "setting_of_next_year": {"size": 1}, "layers_of_next_year": [1, 2]}
    edit_config(checkpoint, **settings)
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    (tmp_path / "out").mkdir()
    result = import_checkpoint(import_job(checkpoint, tmp_path / "out"))
    assert result.labels == ("NEGATIVE", "POSITIVE")
    weights = load_model(tmp_path / "out").state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_weights_that_do_not_fit_the_config_are_refused(checkpoint):
    from toolchain.backends.pytorch import load_model

    edit_config(checkpoint, dim=64)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(checkpoint)


@pytest.mark.parametrize("change", [{"dim": "32"}, {"dim": None}, {"vocab_size": None}, {"n_heads": 0}])
def test_a_config_without_a_valid_model_is_refused(checkpoint, change):
    from toolchain.backends.pytorch import load_model

    edit_config(checkpoint)
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"cannot be loaded|no weights"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"pad_token_id": -1}, "has no row for the pad_token_id"),
        ("tokenizer_config.json", {"model_max_length": 0}, "leave no room for a word"),
        ("tokenizer_config.json", {"model_max_length": "512"}, "leave no room for a word"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(checkpoint, tmp_path, name, change, message):
    from toolchain.build.steps.importing import import_checkpoint

    file = checkpoint / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(import_job(checkpoint, tmp_path / "out"))


def test_a_generic_tokenizer_of_transformers_5_is_read(checkpoint, tmp_path):
    """transformers 5 writes a tokenizer class name that transformers 4 refuses."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from toolchain.build.steps.importing import import_checkpoint

    tokens = AutoTokenizer.from_pretrained(checkpoint)("Café naïve, isn't it?")["input_ids"]
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "TokenizersBackend"}))
    (tmp_path / "out").mkdir()
    import_checkpoint(import_job(checkpoint, tmp_path / "out"))
    saved_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert tokenizer("Café naïve, isn't it?")["input_ids"] == tokens


def test_the_maximum_length_leaves_out_the_positions_of_padding(tmp_path):
    """RoBERTa's position embeddings have 514 rows, but sentences use only the 512 rows after the padding index."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from toolchain.build.steps.importing import _max_length

    config = RobertaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50
    )
    config.max_position_embeddings = 514
    tokenizer = type("Tokenizer", (), {"model_max_length": int(1e30)})
    assert _max_length(RobertaForSequenceClassification(config), tokenizer) == 512


def test_the_code_of_a_checkpoint_does_not_run(checkpoint, tmp_path):
    from toolchain.backends.pytorch import load_model

    marker = tmp_path / "it ran"
    (checkpoint / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\nclass M: pass\nclass C: pass\n")
    edit_config(
        checkpoint,
        model_type="homemade",
        auto_map={"AutoConfig": "modeling.C", "AutoModelForSequenceClassification": "modeling.M"},
    )
    with pytest.raises(CheckpointError):
        load_model(checkpoint)
    assert not marker.exists()


def test_a_base_for_training_needs_no_head_but_passes_the_other_checks(checkpoint, tmp_path):
    remove_head(checkpoint)
    base = checkpoints.locate(str(checkpoint))
    folder, pinned = fetch(base, head=False)
    assert (folder, pinned) == (checkpoint, checkpoints.pin(base, head=False))
    assert pinned.revision.startswith("sha256:")
    with pytest.raises(CheckpointError, match="no classification head"):
        fetch(base)
    for number, (damage, message) in enumerate(
        [
            (rename_to_pickle, "only as pickle"),
            (remove_tokenizer, "no tokenizer"),
            (truncate_weights, "truncated"),
            (mark_as_quantised, "quant"),
        ]
    ):
        damaged_folder = shutil.copytree(checkpoint, tmp_path / str(number))
        damage(damaged_folder)
        with pytest.raises(CheckpointError, match=message):
            fetch(checkpoints.locate(str(damaged_folder)), head=False)


def test_locate_accepts_the_names_of_models(checkpoint, built_tiny):
    assert checkpoints.locate("reference") == Source("embedded", "reference")
    assert checkpoints.locate("somebody/some-model") == Source("hub", "somebody/some-model")
    # `locate` looks for a model in exported/ only if its second argument is the path of exported/
    assert checkpoints.locate("tiny") == Source("hub", "tiny")
    assert checkpoints.locate("tiny", built_tiny.exported).same_origin(built_tiny.source)
    with pytest.raises(CheckpointError, match="There is no folder"):
        checkpoints.locate("./nowhere")


@pytest.mark.slow
def test_the_suggested_command_converts_a_pickle(checkpoint, tmp_path):
    """Runs the command that the error message suggests, in a shell, on a trusted checkpoint."""
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickle") as error:
        check(checkpoint)
    command = error.value.hint[error.value.hint.index("python -c ") :].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, cwd=tmp_path)
    converted_folder = checkpoint.with_name(f"{checkpoint.name}-safetensors")
    check(converted_folder)
    assert not list(converted_folder.glob("*.bin"))
    stored_tensors = load_file(converted_folder / "model.safetensors")
    assert stored_tensors.keys() == weights.keys()
    assert all(torch.equal(stored_tensors[name], tensor) for name, tensor in weights.items())


def test_an_error_names_weights_with_nan(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier.bias contains NaN or infinity"):
        ensure(Workspace.open(str(checkpoint), tmp_path / "exported"), ["torch-fp32"], {}, lambda line: None)
    assert not (tmp_path / "exported" / checkpoint.name / "torch-fp32").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_are_imported_as_one_float32_file(checkpoint, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file

    model = load_model(checkpoint).to(getattr(torch, dtype))
    expected = {name: tensor.float() for name, tensor in model.state_dict().items()}
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="1MB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    artifact = ensure(workspace, ["torch-fp32"], {}, lambda line: None)["torch-fp32"]
    stored_tensors = load_file(artifact.path / "model.safetensors")
    assert all(torch.equal(stored_tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "change", [{"n_layers": 2**53}, {"dim": 10**200}, {"vocab_size": 10**9}, {"num_labels": 10**9}]
)
def test_a_config_of_a_far_larger_model_than_the_weights_is_refused(checkpoint, tmp_path, change):
    from toolchain.build.steps.importing import import_checkpoint

    edit_config(checkpoint, **change)
    with pytest.raises(CheckpointError, match=r"config.json describes a model of .* parameters, but the weights have"):
        import_checkpoint(import_job(checkpoint, tmp_path / "out"))
