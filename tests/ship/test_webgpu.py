"""Tests of variants for WebGPU: the table of operators, and onnxruntime-web on a software graphics processor.

SwiftShader is slow and has no fp16, so only the CPU runs fp16 graphs in these tests.
"""

import base64
import importlib.util
import json
import re
import threading

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from chromium import WEBGPU_FLAGS, Chromium
from conftest import MODULES, TESTS
from demo_page import READY, needs_chromium, serve, use_npm_packages
from webgpu_models import INPUT, one_operator_models

from toolchain import passes
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import HALF_PASSES, WEBGPU_PASSES, Optimize, Quantize
from toolchain.artifacts.variants import derive_variant
from toolchain.backends import Place, open_session
from toolchain.build.pipeline import ensure
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import GraphError, ShippingError, UnknownVariantError
from toolchain.passes.model_shape import context_of
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order
from toolchain.ship.targets import clients, webgpu

RUN = (TESTS / "clients" / "webgpu.js").read_text()
RELEASE = clients.version(clients.RUNTIME)
# Operators that ONNX Runtime runs on the CPU, because they compute the position ids from the number of tokens.
SHAPE_OPERATORS = {"Gather", "Unsqueeze", "Slice"}
MOST_DIFFERENCE = 1e-3
SHORT, LONG = 20, 4  # numbers of sentences; SwiftShader takes seconds for each long sentence


def placements(log):
    """Returns the operators of a session by execution provider, read from ONNX Runtime's log.

    The log has no list of operators if all nodes have the same provider.
    """
    by_provider, provider = {}, None
    for line in log.splitlines():
        if match := re.search(r"Node\(s\) placed on \[(\w+)ExecutionProvider\]", line):
            provider = by_provider.setdefault(match[1], [])
        elif provider is not None and (match := re.search(r"AssignedToAnEp\]\s+(\w+) \(", line)):
            provider.append(match[1])
    return by_provider


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile"), WEBGPU_FLAGS) as chromium:
        yield chromium


def run_on_webgpu(browser, folder, models, feeds, **options):
    """Runs models in a page on WebGPU; returns the log and the outputs of each model."""
    (folder / "onnxruntime-web").symlink_to(MODULES / "onnxruntime-web")
    (folder / "page.html").write_text("<!doctype html><title>page</title><link rel=icon href='data:,'>")
    with serve(folder) as address:
        browser.open(f"{address}page.html")
        return browser.run(f"({RUN})({json.dumps(models)}, {json.dumps(feeds)}, {json.dumps(options)})")


def test_the_pinned_release_has_a_table():
    assert "MatMul" in webgpu.OPERATORS[RELEASE]["right"]
    for table in webgpu.OPERATORS.values():
        assert not set(table["right"]) & set(table["wrong"])


@needs_chromium
@pytest.mark.slow
@pytest.mark.web
def test_the_table_has_the_operators_of_the_provider(browser, tmp_path):
    models = dict(one_operator_models())
    encoded = [base64.b64encode(model).decode() for model in models.values()]
    feeds = [{"x": ["float32", INPUT.ravel().tolist(), list(INPUT.shape)]}]
    results = run_on_webgpu(browser, tmp_path, encoded, feeds, graphOptimizationLevel="disabled")
    table = {"right": [], "wrong": []}
    for (key, model), result in zip(models.items(), results, strict=True):
        if "All nodes placed on [WebGpu" not in result["log"] and not placements(result["log"]).get("WebGpu"):
            continue
        expected = ort.InferenceSession(model).run(None, {"x": INPUT})[0].ravel()
        output = result["outputs"][0]  # JSON has null for NaN
        is_right = not isinstance(output, str) and np.allclose(
            np.array(output, float), expected, 1e-3, 1e-3, equal_nan=True
        )
        table["right" if is_right else "wrong"].append(key)
    assert {state: sorted(keys) for state, keys in table.items()} == webgpu.OPERATORS[RELEASE]


FORMS = {
    "onnx-webgpu": WEBGPU_PASSES,
    "onnx-webgpu-fp16": (*WEBGPU_PASSES, *HALF_PASSES),
    "onnx-webgpu-int4": (*WEBGPU_PASSES, "quantize-linear-int4", "quantize-embedding-int4-webgpu"),
}


@pytest.fixture
def graph_of(built_tiny):
    """Returns a function that builds the graph of a variant from the tiny model's standard graph."""
    parent = built_tiny.load("onnx-std")
    return lambda name: passes.rewrite(passes.read(parent.onnx_path), FORMS[name], context_of(parent.path))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("left", [False, True])
def test_a_graph_for_webgpu_keeps_the_logits_with_operators_of_the_table(built_tiny, graph_of, name, left):
    model, counts = graph_of(name)
    webgpu.require_supported(VariantName(name), model)
    assert counts["split-attention"] == 2
    # The provider has no Cast from int64, so a Cast of the mask would run on the CPU. An fp16 graph casts its logits.
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert all(cast.outputs[0].is_graph_output() for cast in casts)
    batch = pad([[101, 7592, 2088, 102], [101, 102]], ("input_ids", "attention_mask"), 0, left)
    [logits] = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, batch)
    assert logits.dtype == np.float32
    session = open_session(built_tiny.path("onnx-std"), "onnx", Place("cpu", 1))
    limit = {"onnx-webgpu": 1e-5, "onnx-webgpu-fp16": 1e-2}.get(name, 3)
    assert np.abs(logits - session.run(batch)).max() <= limit


def test_ship_refuses_an_operator_that_the_provider_computes_wrongly(graph_of):
    model, _ = graph_of("onnx-webgpu")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.domain, softmax.op_type = "com.microsoft", "MultiHeadAttention"
    message = rf"onnxruntime-web {RELEASE} does not compute .* of onnx-webgpu correctly: com\.microsoft\.MultiHeadAtt"
    with pytest.raises(ShippingError, match=message):
        webgpu.require_supported(VariantName("onnx-webgpu"), model)


def test_quantize_builds_fp16_and_int4_from_a_graph_for_webgpu():
    half = Optimize.to_half(VariantName("onnx-webgpu-pruned50"))
    assert derive_variant("onnx-webgpu-pruned50", half).name == "onnx-webgpu-pruned50-fp16"
    assert derive_variant("onnx-webgpu", Quantize(scheme="int4")).name == "onnx-webgpu-int4"
    assert derive_variant("onnx-std", Optimize.for_provider("webgpu")).name == "onnx-webgpu"
    with pytest.raises(UnknownVariantError, match="takes an fp32 graph"):
        derive_variant("onnx-webgpu", Quantize())


def test_quantize_refuses_int8_embeddings_for_webgpu(built_tiny):
    step = Quantize(scheme="int4", embeddings="int8")
    with pytest.raises(GraphError, match=r"WebGPU cannot look up embeddings of 8 bits\. Leave --embeddings out"):
        ensure(built_tiny, ["onnx-webgpu-int4"], {"onnx-webgpu-int4": step}, lambda line: None)
    validation = built_tiny.load("onnx-webgpu").manifest.validation
    assert validation["passed"]
    assert max(validation["grid_largest_delta"].values()) <= 1e-4


def batches_of_validation_set(encoder):
    """Returns batches of the shortest validation sentences, and of a few with more than 32 tokens, padded right."""
    rows = sorted(encoder.encode(inputs.load_embedded().texts), key=len)
    long_rows = [row for row in rows if len(row) > 32][:LONG]
    groups = [rows[start : start + 10] for start in range(0, SHORT, 10)] + [long_rows]
    return [pad(group, encoder.names, encoder.pad_id) for group in groups]


@needs_chromium
@pytest.mark.web
def test_webgpu_gives_the_logits_of_short_and_long_sentences(reference, browser, tmp_path):
    artifact = ensure(reference, ["onnx-webgpu"], {}, lambda line: None)["onnx-webgpu"]
    encoder = Encoder.open(artifact.path, ["input_ids", "attention_mask"], artifact.manifest.max_length)
    batches = batches_of_validation_set(encoder)
    (tmp_path / "model.onnx").symlink_to(artifact.onnx_path)
    feeds = [
        {name: ["int64", array.ravel().tolist(), list(array.shape)] for name, array in batch.items()}
        for batch in batches
    ]
    [result] = run_on_webgpu(browser, tmp_path, ["/model.onnx"], feeds)
    assert set(placements(result["log"])["CPU"]) <= SHAPE_OPERATORS
    session = open_session(reference.path("onnx-fp32"), "onnx", Place("cpu", 1))
    expected = np.concatenate([session.run(batch) for batch in batches])
    logits = np.concatenate([np.array(output) for output in result["outputs"]]).reshape(expected.shape)
    assert len(logits) == SHORT + LONG
    assert np.abs(logits - expected).max() <= MOST_DIFFERENCE
    assert (logits.argmax(1) == expected.argmax(1)).all()


@pytest.fixture(scope="module")
def page(built_tiny, tmp_path_factory):
    """The address of the demo page of a bundle with a variant for WebAssembly and two for WebGPU."""
    folder = tmp_path_factory.mktemp("bundle") / "web"
    use_npm_packages(built_tiny.exported)
    names = ("onnx-int8", "onnx-webgpu", "onnx-webgpu-fp16")
    shipping.ship(built_tiny, Order(names, "web"), folder, lambda line: None, no_bar)
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q8", "device_config": {"webgpu": {"dtype": "fp32"}}}
    spec = importlib.util.spec_from_file_location("serve", folder / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Handler.log_message = lambda *arguments: None
    with module.create_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


MIDDLE = """(id => {
    const element = document.getElementById(id);
    element.scrollIntoView();
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
})"""
CHOOSE = """(index => {
    const variants = document.getElementById("variant");
    variants.selectedIndex = index;
    variants.dispatchEvent(new Event("change"));
})"""


def click(browser, element):
    """Clicks with the mouse on the middle of an element, given by its id."""
    x, y = browser.run(f"{MIDDLE}('{element}')")
    for kind in ("mousePressed", "mouseReleased"):
        browser.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def choose(browser, index):
    """Chooses a variant of the page, and returns the page's answer."""
    browser.run(f"{CHOOSE}({index})")
    return browser.run(READY)


@needs_chromium
@pytest.mark.slow
@pytest.mark.web
def test_the_page_runs_variants_on_webgpu_and_on_webassembly(browser, page, tmp_path):
    _, address = page
    browser.show_as()
    browser.open(address)
    threads = browser.run("Math.min(4, navigator.hardwareConcurrency)")
    assert browser.run("crossOriginIsolated")
    assert re.search(rf"onnx-int8 is ready.* WebAssembly, {threads} thread", browser.run(READY))
    click(browser, "classify")
    assert re.search(r"onnx-int8 took \d", browser.run(READY))
    assert re.search(r"onnx-webgpu is ready.* runs on WebGPU\.", choose(browser, 1))
    click(browser, "classify")
    answer = browser.run(READY)
    assert re.search(r"onnx-webgpu took \d", answer)
    assert re.search(r"onnx-int8 took \d", answer)
    click(browser, "check")
    browser.run(READY)
    assert "match the recorded logits" in browser.run("document.getElementById('proof').innerText")
    answer = choose(browser, 2)
    assert "This graphics processor computes no fp16" in answer
    assert "onnx-webgpu-fp16 runs on WebAssembly instead." in answer
    browser.picture(tmp_path / "page.png")
    assert browser.complaints(address) == []


@needs_chromium
@pytest.mark.slow
@pytest.mark.web
def test_the_page_falls_back_without_webgpu_and_explains_file_addresses(page, tmp_path):
    folder, address = page
    with Chromium(tmp_path / "profile") as plain_browser:
        plain_browser.open(address)
        plain_browser.run(READY)
        answer = choose(plain_browser, 1)
        assert "offers no WebGPU adapter here: turn on hardware acceleration" in answer
        click(plain_browser, "classify")
        assert re.search(r"onnx-webgpu took \d", plain_browser.run(READY))
        plain_browser.open(folder / "index.html")
        assert "run python serve.py in its folder" in plain_browser.run("document.getElementById('answer').innerText")
