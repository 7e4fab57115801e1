"""Checkpoints, artifacts, data files and small records: valid files, and the functions that read them."""

import gzip
import hashlib
import json
import random
import shutil
import struct
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

from conftest import import_job
from hostile.harness import call
from hostile.mutations import mutate_bytes, mutate_json, mutate_lines

from toolchain.backends.reduced import Precision
from toolchain.build.pipeline import ensure
from toolchain.build.steps.importing import import_checkpoint
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.files import Texts
from toolchain.data.inputs import SST2_LABELS, TrainingSource
from toolchain.data.labels import LabelSet
from toolchain.errors import ToolchainError
from toolchain.models import adapters, checkpoints, locations
from toolchain.models.architectures import LayerShape, read_shapes
from toolchain.models.locations import Source
from toolchain.pruning import costs
from toolchain.tuning.candidates import Candidate
from toolchain.tuning.study import Outcome, open_study

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "bad", "##s", ".")


def write_checkpoint(folder: Path) -> None:
    """Saves a random DistilBERT classifier of one layer, 8 wide, with a vocabulary of 11 tokens."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(1)
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    sizes = {"vocab_size": len(WORDS), "dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    config = DistilBertConfig(**sizes, max_position_embeddings=32, id2label=names)
    config.label2id = {name: index for index, name in names.items()}
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(zip(("pad", "unk", "cls", "sep", "mask"), WORDS[:5], strict=True))
    tokens = {f"{name}_token": word for name, word in special.items()}
    names = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 32}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, **names).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"train": "reviews.csv:0", "key": "0", "labels": ["a"]}))


def list_files(folder: Path) -> list[Path]:
    """Returns the files directly in the folder."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def mutate_model_file(rng: random.Random, content: bytes) -> bytes:
    """Changes a JSON file as JSON, and a safetensors file in its header or its bytes."""
    if content[:1] in b"{[":
        return mutate_json(rng, content) if rng.random() < 0.9 else mutate_bytes(rng, content)
    if len(content) < 8 or rng.random() < 0.3:
        return mutate_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = mutate_json(rng, content[8 : 8 + length])
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, length))
    return struct.pack("<Q", stated) + header + content[8 + length :]


def import_folder(folder: Path, rng: random.Random) -> None:
    """Checks and imports a checkpoint, as the first step of `toolchain export` does."""
    with tempfile.TemporaryDirectory() as target, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        checkpoints.check(folder)
        import_checkpoint(import_job(folder, Path(target)))


def write_adapter(folder: Path) -> None:
    """Writes the settings of a LoRA adapter."""
    settings = {
        **{"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "user/name", "revision": "main"},
        **{"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"], "bias": "none", "init_lora_weights": True},
        **{"modules_to_save": None, "rank_pattern": {}, "inference_mode": True, "auto_mapping": None},
    }
    (folder / adapters.SETTINGS).write_text(json.dumps(settings))


def read_adapter(folder: Path, rng: random.Random) -> None:
    """Reads the settings of an adapter and the base that they name."""
    adapters.settings(folder)
    adapters.base(folder)


def write_artifact(folder: Path) -> None:
    """Imports the checkpoint of `write_checkpoint`, and writes a file of texts."""
    source = folder / "checkpoint"
    write_checkpoint(source)
    (source / "training.json").unlink()
    ensure(Workspace.open(str(source), folder / "exported", "m"), ["torch-fp32"], {}, lambda *_: None)
    shutil.rmtree(source)
    (folder / "texts.csv").write_text("text\na good film\nbad films .\n")


ARTIFACT = Path("exported", "m", "torch-fp32")


def list_artifact(folder: Path) -> list[Path]:
    """Returns the files of the artifact except the manifest."""
    return [path for path in list_files(folder / ARTIFACT) if path.name != "manifest.json"]


def seal_files(folder: Path) -> None:
    """Writes the true digests and sizes of the files into the manifest, as an attacker would."""
    file = folder / ARTIFACT / "manifest.json"
    body = json.loads(file.read_text())
    for entry in body["files"]:
        content = (folder / ARTIFACT / entry["path"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    file.write_text(json.dumps(body))
    seal_manifest(folder)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_manifest(folder: Path) -> None:
    """Writes the id and the seal that follow from the content of the manifest, if it has the parts of an id."""
    file = folder / ARTIFACT / "manifest.json"
    try:
        body = json.loads(file.read_text())
        content = {
            **{name: body[name] for name in ("inputs", "outputs", "labels", "max_length")},
            "files": sorted(body["files"], key=lambda entry: entry["path"]),
            "parent": body["parent"] and body["parent"]["id"],
            "settings": body["step"]["settings"],
            "step": body["step"]["name"],
            "version": body["step"]["version"],
        }
        body["id"] = _digest(content)
        body["seal"] = _digest({name: value for name, value in body.items() if name != "seal"})
        file.write_text(json.dumps(body))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return  # the mutation removed a part of the id


def read_artifact(folder: Path, rng: random.Random) -> None:
    """Lists the variants of a foreign folder of artifacts, and predicts with one of them."""
    choice = ("--model", "m", "--exported", folder / "exported")
    call("variants", *choice, "--json")
    call("predict", "torch-fp32", folder / "texts.csv", "--output", folder / "output" / "x.jsonl", *choice)


SAVED = (Path("stream", "data-0.arrow"), Path("record", "state.json"))


def write_data(folder: Path) -> None:
    """Writes the same labelled texts as CSV, TSV, JSON lines, compressed CSV, Parquet and two saved data sets."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(f"text {i} of a film", ("POSITIVE", "NEGATIVE")[i % 2]) for i in range(12)]
    for ending, separator in (("csv", ","), ("tsv", "\t")):
        lines = ["text" + separator + "label", *(f"{text}{separator}{label}" for text, label in rows)]
        (folder / f"data.{ending}").write_text("\n".join(lines) + "\n")
    (folder / "data.csv.gz").write_bytes(gzip.compress((folder / "data.csv").read_bytes(), mtime=0))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    table = pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    buffer = BytesIO()
    parquet.write_table(table, buffer)
    (folder / "data.parquet").write_bytes(buffer.getvalue())
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"dtype": "string", "_type": "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for path in SAVED:
        saved = (folder / path).parent
        saved.mkdir()
        with pa.ipc.new_stream(saved / "data-0.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
        (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_split": None}))


def list_data(folder: Path) -> list[Path]:
    """Returns the files under attack: in one folder of Arrow files the stream, in the other one the record."""
    return [*list_files(folder), *(folder / path for path in SAVED if (folder / path).exists())]


def mutate_data(rng: random.Random, content: bytes) -> bytes:
    """Changes a line of a text file, and bytes of a compressed file or a Parquet file."""
    is_text = content[:1] in b"t{"
    return mutate_lines(rng, content) if is_text and rng.random() < 0.7 else mutate_bytes(rng, content)


def read_data(folder: Path, rng: random.Random) -> None:
    """Reads each file or folder as texts for `predict`, or as labelled texts for `bench` or `finetune`."""
    refusal = None
    for file in list_data(folder):
        path = file if file.parent == folder else file.parent
        try:
            rng.choice((_read_texts, _read_labelled, _read_training))(str(path))
        except ToolchainError as error:
            refusal = error
    if refusal:
        raise refusal


def _read_texts(file: str) -> None:
    for _ in Texts(file).read():
        pass


def _read_labelled(file: str) -> None:
    inputs.load(file, SST2_LABELS)


def _read_training(file: str) -> None:
    table = TrainingSource(file).read()
    inputs.data_from_table(table, LabelSet(("NEGATIVE", "POSITIVE")))


SETTINGS = {
    **{"machine": "x", "threads": 2, "onnxruntime": "1", "passes": ["a"], "model_type": "distilbert"},
    **{"width": 8, "head": 4, "layers": [{"heads": 2, "ffn": 16}]},
}


def write_records(folder: Path) -> None:
    """Writes a latency table, layer shapes, the number format of a quantised model, and a checkpoint's location."""
    times = {"base_ms": 1.0, "heads_ms": {"0": 0.0, "2": 1.5}, "neurons_ms": {"0": 0.0, "16": 2.5}}
    (folder / "latency.json").write_text(json.dumps({"schema": costs.SCHEMA, **SETTINGS, **times}))
    shapes = {"layers": [{"heads": 2, "ffn": 16}, {"heads": 0, "ffn": 3}], "embedding_rank": 4}
    (folder / checkpoints.SHAPES).write_text(json.dumps(shapes))
    Precision("int8", ("a.b", "c")).write(folder)
    locations.record(folder, Source("folder", "/checkpoints/tiny"))


def read_records(folder: Path, rng: random.Random) -> None:
    """Reads the four records, and computes speed-ups from the latency table."""
    read_shapes(folder)
    Precision.read(folder)
    source = locations.read(folder, Source("folder", "tiny"))
    assert Path(source.ref).name == "tiny"
    table = costs._read_table(folder / "latency.json", SETTINGS)
    whole, half = (table.sentence_ms([LayerShape(heads, ffn)] * 2) for heads, ffn in ((2, 16), (1, 8)))
    json.dumps(round(whole / half, 3), allow_nan=False)


IDENTITY = ("model", "data")


def write_study(folder: Path) -> None:
    """Writes a search with measured, refused and interrupted candidates."""
    with open_study(folder / "output" / "search.journal", "latency", 1.0, IDENTITY, lambda: None) as study:
        for ratio in (0, 50):
            trial, candidate = study.ask(Candidate(ratio=ratio, epochs=1 if ratio else 0))
            study.tell(trial, candidate, Outcome(f"v{ratio}", "id", 0.5, 1.5, 1.5, 1000))
        trial, candidate = study.ask(Candidate(ratio=40, epochs=1))
        study.give_up(trial, candidate, refused=True)
        study.ask(Candidate(ratio=30, epochs=1))


def read_study(folder: Path, rng: random.Random) -> None:
    """Resumes the search and asks for its next candidate."""
    with open_study(folder / "output" / "search.journal", "latency", 1.0, IDENTITY, lambda: None) as study:
        assert study.remaining is not None
        trial, candidate = study.ask(None)
        study.tell(trial, candidate, Outcome("v", "id", 0.25, 2.0, 2.0, 900))
        json.dumps([outcome.cost("latency") for outcome in study.front], allow_nan=False)
        str(study.best)


def write_graph(folder: Path) -> None:
    """Writes a small ONNX graph with a table, a matrix product and a normalisation."""
    import numpy as np
    from onnx import TensorProto, checker, helper, numpy_helper, save

    weights = {"table": np.ones((11, 8)), "weight": np.ones((8, 2)), "scale": np.ones(8), "bias": np.ones(8)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("LayerNormalization", ["words", "scale", "bias"], ["normal"], axis=-1),
        helper.make_node("MatMul", ["normal", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 2])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    checker.check_model(model)
    save(model, folder / "model.onnx")


def read_graph(folder: Path, rng: random.Random) -> None:
    """Reads the graph, describes it, rewrites it and writes it."""
    from toolchain import passes

    model = passes.read(folder / "model.onnx")
    passes.facts(model)
    passes.specs(model.graph.inputs)
    rewritten, _ = passes.rewrite(model, ("first-token", "quantize-linear", "quantize-embedding"), passes.Context(2, 8))
    (folder / "output").mkdir()
    passes.write(rewritten, folder / "output" / "model.onnx")
