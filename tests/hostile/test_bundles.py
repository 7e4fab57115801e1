"""Tests of hostile bundles: `verify` and `predict` refuse them in one sentence, with limits of time and memory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import onnx
import pytest
from hostile import bundles

from toolchain.data.encoding import Encoder
from toolchain.errors import CheckpointError, TamperedError, VerdictError
from toolchain.models import checkpoints
from toolchain.models.tokenizers import load_tokenizer
from toolchain.progress import no_bar
from toolchain.ship import checking, process, shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.shipping import Order

# tokenizers panics when it splits the first text with the first part, and when it reads the second part.
PANICS = {
    "text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "file": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A valid small bundle. Tests must not change this bundle."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    folder.mkdir()
    bundles.write_bundle(folder)
    return folder


@pytest.fixture
def bundle(pristine, tmp_path):
    """A copy of the small bundle, which a test may change."""
    shutil.copytree(pristine, tmp_path / "b")
    return tmp_path / "b"


@pytest.fixture
def texts(tmp_path):
    """A file of two texts; the second one has a word that the tokenizer does not know."""
    (tmp_path / "texts.txt").write_text("a good film\nunknown\n")
    return tmp_path / "texts.txt"


@pytest.fixture
def alarm():
    """Interrupts a test that opens a named pipe, which would wait for ever."""

    def interrupt(number, frame):
        raise TimeoutError("the test waits")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.slow
def test_the_small_bundle_is_valid_and_has_the_fields_of_a_shipped_one(bundle, texts, built_tiny, tmp_path, say):
    code, out, err = say("verify", bundle)
    assert (code, "onnx-fp32: largest" in out) == (0, True), err
    code, out, err = say("predict", bundle, texts)
    assert code == 0, err
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a good film", "unknown"]
    order = Order(("onnx-fp32",), "python", demo=False)
    optional = {"app_settings"}  # a bundle has settings only with --session
    shipped = shipping.ship(built_tiny, order, tmp_path / "shipped", lambda line: None, no_bar)
    small = json.loads((bundle / "bundle.json").read_bytes())
    assert shipped.keys() == small.keys()
    assert shipped["models"][0].keys() == small["models"][0].keys() - optional


def test_the_name_of_a_variant_may_have_a_label(bundle, say):
    for name in ("bundle.json", "golden.json"):
        content = (bundle / name).read_text().replace(bundles.VARIANT, "onnx-fp32+no-first-query")
        (bundle / name).write_text(content)
    bundles.reseal(bundle)
    with bundles.without_child():
        code, out, err = say("verify", bundle)
    assert (code, "onnx-fp32+no-first-query: largest" in out) == (0, True), err


@pytest.mark.slow
def test_a_model_that_runs_for_ever_is_refused(bundle, say, monkeypatch):
    monkeypatch.setattr(process, "BASE_S", 2.0)
    bundles.replace_model(bundle, bundles.endless_model())
    code, _, err = say("verify", bundle)
    assert (code, "the models or the tokenizer need more than 2 s" in err) == (3, True), err


@pytest.mark.slow
def test_a_model_that_runs_for_ever_on_some_texts_is_stopped(bundle, texts, tmp_path, say, monkeypatch):
    bundles.replace_model(bundle, bundles.trap_model())
    assert say("verify", bundle)[0] == 0
    monkeypatch.setattr(process, "BASE_S", 3.0)
    code, _, err = say("predict", bundle, texts, "--output", tmp_path / "scores.csv")
    assert (code, "the models or the tokenizer need more than 3 s" in err) == (3, True), err
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_model_that_needs_too_much_memory_is_refused(bundle, texts, say):
    bundles.replace_model(bundle, bundles.large_model())
    for command in (("verify", bundle), ("predict", bundle, texts)):
        code, _, err = say(*command)
        assert (code, "the models or the tokenizer need more than" in err, " MB." in err) == (3, True, True), err


@pytest.mark.slow
def test_a_child_ends_even_if_its_parent_does_not_stop_it(bundle):
    bundles.replace_model(bundle, bundles.endless_model())
    body = json.loads((bundle / "bundle.json").read_bytes())
    messages = [{"folder": str(bundle), "memory_bytes": 1 << 30}, {"do": "compare", "body": body, "seconds": -9.5}]
    command = [sys.executable, "-P", "-m", "toolchain.ship.worker"]
    text = "".join(json.dumps(message) + "\n" for message in messages)
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGALRM, ended.stderr


def test_a_crash_of_the_runtime_is_a_verdict(bundle, say, monkeypatch):
    """A child that the system kills stands for a crash, because no crash of ONNX Runtime is known."""
    ask = process.BundleProcess.ask

    def crash(self, message, timeout_s):
        if "do" in message:
            os.kill(self.pid, signal.SIGSEGV)
        return ask(self, message, timeout_s)

    monkeypatch.setattr(process.BundleProcess, "ask", crash)
    code, _, err = say("verify", bundle)
    assert (code, "cannot be opened. The process crashed with SIGSEGV." in err) == (3, True), err


@pytest.mark.parametrize("place", bundles.leaking_models())
def test_a_model_that_opens_another_file_is_refused(bundle, place):
    model = bundles.leaking_models()[place]
    assert list(checking.external_tensors(model)) == ["secret"]
    if place == "deep graph":  # protobuf refuses to read it
        return
    (bundle.parent / "secret").write_bytes(b"\0" * 8)
    bundles.replace_model(bundle, model)
    body, _ = checking.read(bundle)
    with pytest.raises(VerdictError, match="stores the tensor 'secret' in another file"):
        checking.compare(bundle, body)


@pytest.mark.slow
def test_the_command_refuses_a_local_function_that_opens_another_file(bundle, texts, say):
    bundles.replace_model(bundle, bundles.leaking_models()["function"])
    for command in (("verify", bundle), ("predict", bundle, texts)):
        code, _, err = say(*command)
        assert (code, "stores the tensor 'secret' in another file" in err) == (3, True), err


@pytest.mark.parametrize("when", PANICS)
def test_a_panic_of_the_tokenizer_is_a_verdict(bundle, texts, say, when):
    bundles.replace_values(bundle, "tokenizer.json", **PANICS[when])
    with bundles.without_child():
        for command in (("verify", bundle), ("predict", bundle, texts)):
            code, _, err = say(*command)
            assert (code, "tokenizer.json cannot be used: PanicException" in err) == (3, True), err
    assert bundled.main(bundle) == 3


def test_a_panic_of_a_checkpoint_s_tokenizer_is_an_error(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **PANICS["file"]}))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*precompiled_charsmap"):
        load_tokenizer(tmp_path / "checkpoint")


def test_a_panic_on_a_text_is_an_error(bundle):
    bundles.replace_values(bundle, "tokenizer.json", **PANICS["text"])
    encoder = Encoder.open(bundle, ("input_ids", "attention_mask"), 8)
    with pytest.raises(CheckpointError, match=r"fails on a text: the library crashed: chunk size must be non-zero"):
        encoder.encode(["a good film"])


CHANGES = {
    "no models": {"models": []},
    "no labels": {"labels": []},
    "one label": {"labels": ["no"]},
    "equal labels": {"labels": ["no", "no"]},
    "a third label": {"labels": ["no", "yes", "maybe"]},
    "an unknown task": {"task": "\x1b[2J"},
    "entities": {"task": "token_classification"},
    "no tokens": {"max_length": 0},
    "many tokens": {"max_length": 1 << 40},
    "a fraction of a token": {"max_length": 7.5},
    "a negative token": {"pad_id": -1},
    "a target with control characters": {"target": "python\x1b[2J"},
    "a list as a graph": {"tokenizer_in_graph": ["model.onnx"]},
    "a file twice": {"files": [{"path": "model.onnx", "bytes": 1, "sha256": "0" * 64}] * 2},
    "a detour": {"files": [{"path": "./model.onnx", "bytes": 1, "sha256": "0" * 64}]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_with_impossible_values_is_refused(bundle, texts, say, change):
    bundles.replace_values(bundle, "bundle.json", **CHANGES[change])
    with bundles.without_child():
        for command in (("verify", bundle), ("predict", bundle, texts)):
            code, _, err = say(*command)
            assert (code, "\x1b" in err, "does not match its id" in err) == (3, False, False), err


MODEL_CHANGES = {
    "an unknown input": {"inputs": [{"name": name, "shape": []} for name in ("input_ids", "attention_mask", "secret")]},
    "a missing input": {"inputs": [{"name": "input_ids", "shape": []}]},
    "no logits": {"outputs": [{"name": "probabilities", "shape": []}]},
    "no tolerance": {"tolerance": {}},
    "an infinite tolerance": {"tolerance": {"largest": 10**400, "median": 1}},
    "a name with control characters": {"variant": "\x1b[2J"},
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_verify_of_the_bundle_and_of_the_toolchain_refuse_an_impossible_model(bundle, say, capsys, change):
    model = json.loads((bundle / "bundle.json").read_bytes())["models"][0]
    bundles.replace_values(bundle, "bundle.json", models=[{**model, **MODEL_CHANGES[change]}])
    code, _, err = say("verify", bundle)
    assert (code, "does not match its id" in err) == (3, False), err
    assert bundled.main(bundle) == 3
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bundle.json", "golden.json", "tokenizer.json"])
def test_json_that_nests_too_deep_is_refused(bundle, texts, say, name):
    (bundle / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    bundles.reseal(bundle)
    with bundles.without_child():
        for command in (("verify", bundle), ("predict", bundle, texts)):
            assert say(*command)[0] == 3
    assert bundled.main(bundle) == 3


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", ["bundle.json", "golden.json", "model.onnx"])
@pytest.mark.usefixtures("alarm")
def test_a_pipe_or_a_socket_in_a_bundle_is_refused(bundle, texts, say, name, kind, monkeypatch):
    (bundle / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle / name)
    else:
        monkeypatch.chdir(bundle)  # the path of a socket has at most 108 characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    for command in (("verify", bundle), ("predict", bundle, texts)):
        code, _, err = say(*command)
        assert (code, "not a regular file" in err) == (3, True), err
    assert bundled.main(bundle) == 3


@pytest.mark.usefixtures("alarm")
def test_a_pipe_in_a_checkpoint_or_an_artifact_is_refused(tiny_checkpoint, tiny, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").unlink()
    os.mkfifo(tmp_path / "checkpoint" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is not a regular file"):
        checkpoints.check(tmp_path / "checkpoint")
    artifact = tiny.load("onnx-fp32")
    os.mkfifo(artifact.path / "special_tokens_map.json")
    with pytest.raises(TamperedError, match=r"special_tokens_map\.json is not in the manifest"):
        artifact.verify()


def test_a_bundle_json_of_many_megabytes_is_not_read(bundle, say):
    with (bundle / "bundle.json").open("r+b") as file:
        file.truncate(bundled.MAX_RECORD_BYTES + 1)
    code, _, err = say("verify", bundle)
    assert (code, "has more than 8388608 bytes" in err) == (3, True), err


def test_two_equal_keys_in_the_record_are_refused(bundle, say):
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"labels":', '"labels": ["bad", "good"], "labels":', 1))
    code, _, err = say("verify", bundle)
    assert (code, "an object has two equal keys" in err) == (3, True), err


def test_a_model_file_is_checked_as_the_runtime_reads_it(bundle, say):
    """onnx reads a file by its ending, but ONNX Runtime reads every file as a binary file."""
    for name in ("bundle.json", "golden.json"):
        (bundle / name).write_text((bundle / name).read_text().replace("model.onnx", "model.json"))
    (bundle / "model.onnx").rename(bundle / "model.json")
    onnx.save(bundles.leaking_models()["initializer"], bundle / "model.json", format="protobuf")
    bundles.reseal(bundle)
    code, _, err = say("verify", bundle)
    assert (code, "stores the tensor 'secret' in another file" in err) == (3, True), err
