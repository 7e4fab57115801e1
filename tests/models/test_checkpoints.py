"""Sources of checkpoints, and the refusal of unsafe or invalid ones before they are loaded."""

import json
import shutil

import pytest
from conftest import import_job

from toolchain.backends.pytorch import load_model
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.errors import CheckpointError, HubError
from toolchain.models import checkpoints
from toolchain.models.checkpoints import Source, check, fetch, resolve


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_the_reference_needs_no_network(tmp_path):
    slug, source = resolve("reference", tmp_path)
    folder, pinned = fetch(source)
    assert (slug, source.kind) == ("reference", "embedded")
    assert folder == checkpoints.REFERENCE
    assert pinned.revision.startswith("sha256:")


def test_a_folder_is_pinned_by_its_content(checkpoint, tmp_path):
    slug, source = resolve(str(checkpoint), tmp_path)
    before = fetch(source)[1].revision
    assert slug == "tiny"
    assert fetch(source)[1].revision == before
    edit_config(checkpoint, dropout=0.2)
    assert fetch(source)[1].revision != before


def test_a_model_already_exported_is_known_by_its_name(built_tiny):
    assert resolve("tiny", built_tiny.exported)[1].same_origin(built_tiny.source)


def test_a_name_that_belongs_to_another_source_is_refused(built_tiny, checkpoint):
    with pytest.raises(CheckpointError, match="--as NAME"):
        resolve(str(checkpoint), built_tiny.exported)
    assert resolve(str(checkpoint), built_tiny.exported, "other")[0] == "other"


def test_nobody_takes_the_name_of_the_reference(checkpoint, tmp_path):
    other = checkpoint.rename(checkpoint.with_name("reference"))
    with pytest.raises(CheckpointError, match="name of the embedded model"):
        resolve(str(other), tmp_path)


@pytest.mark.parametrize("slug", ["../up", "a/b", ".hidden", "UPPER"])
def test_a_folder_name_cannot_leave_the_place(checkpoint, tmp_path, slug):
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        resolve(str(checkpoint), tmp_path, slug)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "~/nowhere", "a b", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(model, tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        resolve(model, tmp_path)


def test_a_file_is_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(checkpoint / "config.json"), tmp_path)


def test_a_hub_that_cannot_be_reached_says_what_to_pass_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    slug, source = resolve("somebody/some-Model", tmp_path)
    assert (slug, source) == ("some-model", Source("hub", "somebody/some-Model"))
    with pytest.raises(HubError, match="--model PATH"):
        fetch(source)


@pytest.mark.parametrize(
    ("raised", "says"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "private"), ("RevisionNotFoundError", "revision 'v9'")],
)
def test_each_refusal_of_the_hub_has_its_own_message(monkeypatch, raised, says):
    import httpx  # noqa: F401 - huggingface_hub's errors carry a response
    import huggingface_hub
    from huggingface_hub import errors
    from requests import Response

    def refuse(*_, **__):
        raise getattr(errors, raised)("no", Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=says):
        fetch(Source("hub", "a/b"), "v9")


def test_only_safe_files_are_asked_of_the_hub(monkeypatch, checkpoint):
    import huggingface_hub

    asked = {}

    def download(ref, **options):
        asked.update(options, ref=ref)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, source = fetch(Source("hub", "a/b"), "main")
    assert source.revision == checkpoint.name  # the snapshot's folder is named by its commit
    assert not [p for p in asked["allow_patterns"] if p.endswith((".bin", ".py", ".pt", "*"))]
    assert asked["revision"] == "main"


def test_a_revision_is_for_the_hub(checkpoint):
    with pytest.raises(CheckpointError, match="--revision is for hub models only"):
        fetch(Source("folder", str(checkpoint)), "main")


def break_nothing(folder):
    """The tiny checkpoint is sound."""


def no_head(folder):
    edit_config(folder, architectures=["DistilBertModel"])


def no_architecture(folder):
    edit_config(folder, architectures=None)


def no_config(folder):
    (folder / "config.json").unlink()


def bad_config(folder):
    (folder / "config.json").write_text("[1]")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04 pickle")


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    for name in checkpoints.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def regression(folder):
    edit_config(folder, problem_type="regression")


def strange_labels(folder):
    edit_config(folder, id2label={"1": "a", "2": "b"})


def labels_of_no_kind(folder):
    edit_config(folder, id2label=5)


def labels_alike(folder):
    edit_config(folder, id2label={"0": "same", "1": "same"})


def multi_label(folder):
    edit_config(folder, problem_type="tagging")


def quantised(folder):
    edit_config(folder, quantization_config={"load_in_8bit": True})


def architecture_of_no_kind(folder):
    edit_config(folder, architectures=5)


def config_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def index_of_no_kind(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def index_leaves(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_head, "no classification head"),
        (no_architecture, "its architecture is not stated"),
        (no_config, "has no config.json"),
        (bad_config, "does not contain a JSON object"),
        (no_weights, "has no model.safetensors"),
        (truncated, "truncated"),
        (not_safetensors, "not a safetensors file"),
        (pickle_only, "only as pickle"),
        (no_tokenizer, "has no tokenizer"),
        (regression, "its task is regression"),
        (index_leaves, "outside its folder"),
        (strange_labels, "id2label"),
        (labels_of_no_kind, "id2label"),
        (labels_alike, "id2label"),
        (multi_label, "its task is tagging"),
        (quantised, "already quantised"),
        (architecture_of_no_kind, "no classification head"),
        (config_is_a_folder, "does not contain a JSON object"),
        (index_of_no_kind, "cannot be read"),
        (shard_missing, "is missing"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_words(checkpoint, damage, says):
    check(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=says) as error:
        check(checkpoint)
    assert error.value.hint


def test_a_head_that_was_never_trained_is_refused(checkpoint):
    from safetensors.numpy import load_file, save_file

    from toolchain.backends.pytorch import load_model

    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "classifier" not in name}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    check(checkpoint)  # only its weights can tell
    with pytest.raises(CheckpointError, match=r"no weights for classifier.bias.*is untrained"):
        load_model(checkpoint)


def test_weights_that_do_not_fit_the_config_are_refused(checkpoint):
    from toolchain.backends.pytorch import load_model

    edit_config(checkpoint, dim=64)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "change", [{"dim": "32"}, {"dim": None}, {"vocab_size": None}, {"n_heads": 0}, {"dtype": "int99"}]
)
def test_a_config_that_makes_no_model_is_refused_in_words(checkpoint, change):
    from toolchain.backends.pytorch import load_model

    edit_config(checkpoint)
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"cannot be loaded|no weights"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("config.json", {"pad_token_id": -1}, "has no row for the pad_token_id"),
        ("tokenizer_config.json", {"model_max_length": 0}, "leave no room for a word"),
        ("tokenizer_config.json", {"model_max_length": "512"}, "leave no room for a word"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_in_words(checkpoint, tmp_path, name, change, says):
    from toolchain.build.steps.importing import import_checkpoint

    file = checkpoint / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=says):
        import_checkpoint(import_job(checkpoint, tmp_path / "out"))


def test_positions_are_counted_as_the_model_counts_them(tmp_path):
    """RoBERTa's table of 514 rows holds 512 positions: the first is the one after the padding's."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from toolchain.build.steps.importing import _max_length

    config = RobertaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50
    )
    config.max_position_embeddings = 514
    tokenizer = type("Tokenizer", (), {"model_max_length": int(1e30)})
    assert _max_length(RobertaForSequenceClassification(config), tokenizer) == 512


def test_remote_code_is_never_run(checkpoint, tmp_path):
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


def test_a_base_to_train_on_needs_no_head_and_is_else_as_safe(checkpoint, tmp_path):
    no_head(checkpoint)
    base = checkpoints.locate(str(checkpoint))
    folder, pinned = fetch(base, head=False)
    assert (folder, pinned) == (checkpoint, checkpoints.pin(base, head=False))
    assert pinned.revision.startswith("sha256:")
    with pytest.raises(CheckpointError, match="no classification head"):
        fetch(base)
    for number, (damage, says) in enumerate(
        [
            (pickle_only, "only as pickle"),
            (no_tokenizer, "no tokenizer"),
            (truncated, "truncated"),
            (quantised, "quant"),
        ]
    ):
        broken = shutil.copytree(checkpoint, tmp_path / str(number))
        damage(broken)
        with pytest.raises(CheckpointError, match=says):
            fetch(checkpoints.locate(str(broken)), head=False)


def test_a_base_is_named_as_a_model_is(checkpoint, built_tiny):
    assert checkpoints.locate("reference") == Source("embedded", "reference")
    assert checkpoints.locate("somebody/some-model") == Source("hub", "somebody/some-model")
    assert checkpoints.locate("tiny") == Source("hub", "tiny")  # a name under exported/ only where that is given
    assert checkpoints.locate("tiny", built_tiny.exported).same_origin(built_tiny.source)
    with pytest.raises(CheckpointError, match="There is no folder"):
        checkpoints.locate("./nowhere")


@pytest.mark.slow
def test_the_command_that_converts_a_pickle_does(checkpoint, tmp_path):
    """A shell runs the command of the message on a checkpoint that the test made."""
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
    converted = checkpoint.with_name(f"{checkpoint.name}-safetensors")
    check(converted)
    assert not list(converted.glob("*.bin"))
    stored = load_file(converted / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())


def test_weights_that_are_no_numbers_are_refused_by_name(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier.bias contains NaN or infinity"):
        ensure(Workspace.open(str(checkpoint), tmp_path / "exported"), ["torch-fp32"], {}, lambda line: None)
    assert not (tmp_path / "exported" / checkpoint.name / "torch-fp32").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_are_imported_in_full(checkpoint, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file

    model = load_model(checkpoint).to(getattr(torch, dtype))
    wanted = {name: tensor.float() for name, tensor in model.state_dict().items()}
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="1MB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    opened = Workspace.open(str(checkpoint), tmp_path / "exported")
    built = ensure(opened, ["torch-fp32"], {}, lambda line: None)["torch-fp32"]
    stored = load_file(built.path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in wanted.items())
