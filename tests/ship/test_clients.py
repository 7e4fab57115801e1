"""Tests of bundles in Node, Python, OpenVINO and a browser.

The int8 models answer the whole validation set. The other models, which are slower and round less, answer a part of it.

The clients' environments do not contain the toolchain. Some tests run on emulated processors. `make test-clients`
installs the clients; the tests of a missing client are skipped.
"""

import functools
import json
import re
import shutil
import subprocess

import emulated
import numpy as np
import pytest
from chromium import Chromium
from conftest import MODULES, NODE, ROOT, TESTS, needs_node
from demo_page import READY, needs_chromium, serve, use_npm_packages
from readme_parts import snippet

from toolchain.backends import Place, open_session
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files.verify import read_bundle
from toolchain.ship.bundles import TOLERANCES
from toolchain.ship.shipping import Order

CACHE = ROOT / "exported" / ".cache"
CLIENTS = CACHE / "test-clients"
PYTHON, OPENVINO, PHONE, TEXTS = (
    CLIENTS / name / "bin" / "python" for name in ("python", "openvino", "phone", "texts")
)
FEW, ALL = 200, 872  # numbers of validation sentences
MOST_FLIPS = 5  # limit for the flips in 872 sentences, since kernels of different runtimes round differently

pytestmark = pytest.mark.slow
needs_python = pytest.mark.skipif(not PYTHON.exists(), reason="needs `make test-clients`")
needs_phone = pytest.mark.skipif(not PHONE.exists(), reason="needs `make test-clients`")
needs_openvino = pytest.mark.skipif(not OPENVINO.exists(), reason="needs `make test-clients`")
needs_avx2, needs_arm = (
    pytest.mark.skipif(bool(reason), reason=reason)
    for reason in (emulated.reason_to_skip(processor, CLIENTS) for processor in (emulated.AVX2, emulated.ARM))
)
on_each_processor = pytest.mark.parametrize(
    "processor", [pytest.param(emulated.AVX2, marks=needs_avx2), pytest.param(emulated.ARM, marks=needs_arm)]
)


@pytest.fixture(scope="module")
def bundles(reference, tmp_path_factory):
    """A folder with bundles of the reference model. The web bundle has a demo page if npm packages are installed."""
    folder = tmp_path_factory.mktemp("bundles")
    if MODULES:  # Node searches for packages in the folder of a file and in all parent folders
        (folder / "node_modules").symlink_to(MODULES)
        use_npm_packages(reference.exported)
    for target, names in (
        ("web", ("onnx-int8", "onnx-fp32", "onnx-int4")),
        ("python", ("onnx-int8", "onnx-int8-portable")),
        ("other", ("onnx-std", "onnx-std-int8")),
        ("mobile", ("onnx-int8", "onnx-int8-portable", "onnx-fp32")),
    ):
        order = Order(names, target, demo=MODULES is not None)
        shipping.ship(reference, order, folder / target, lambda line: None, no_bar)
    return folder


@pytest.fixture(scope="module")
def validation_set(tmp_path_factory, reference):
    """A folder with the validation set as texts and as tokens, in JSON; a folder in it for each number of sentences."""
    folder = tmp_path_factory.mktemp("asked")
    data, manifest = inputs.load_embedded(), reference.load("onnx-int8").manifest
    encoder = Encoder.open(reference.path("onnx-int8"), ["input_ids", "attention_mask"], manifest.max_length)
    tokens = encoder.encode(data.texts)
    for count in (FEW, ALL):
        (folder / str(count)).mkdir()
        (folder / str(count) / "texts.json").write_text(json.dumps(data.texts[:count]))
        (folder / str(count) / "tokens.json").write_text(json.dumps(tokens[:count]))
    return folder


def sentences_for(variant):
    """Returns the number of validation sentences that a client answers with this variant."""
    return ALL if "int8" in variant else FEW


@pytest.fixture(scope="module")
def logits_here(reference, validation_set):
    """Returns a function that maps a variant to its logits of the validation sentences, computed one by one."""

    @functools.cache
    def reference_logits(variant, count=None):
        count = count or sentences_for(variant)
        rows = json.loads((validation_set / str(count) / "tokens.json").read_text())
        session = open_session(reference.path(variant), "onnx", Place("cpu", 2))
        return np.concatenate([session.run(pad([row], ("input_ids", "attention_mask"), 0)) for row in rows])

    return reference_logits


def run(*arguments, cwd=None):
    completed = subprocess.run(
        list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def count_flips(answers, logits):
    labels = np.array(["NEGATIVE", "POSITIVE"])[logits.argmax(1)]
    return int((labels != np.array(answers)).sum())


def require_similar(answers, logits, scheme):
    """Checks that the logits are within the bundle's tolerance, and that few labels flip."""
    deltas = np.abs(np.array(answers) - logits).max(axis=1)
    assert deltas.max() <= TOLERANCES[scheme]["largest"]
    assert np.median(deltas) <= TOLERANCES[scheme]["median"]
    max_flips = 0 if scheme == "fp32" else MOST_FLIPS
    assert int((np.array(answers).argmax(1) != logits.argmax(1)).sum()) <= max_flips


@needs_node
@pytest.mark.parametrize(("dtype", "variant"), [("q8", "onnx-int8"), ("fp32", "onnx-fp32"), ("q4", "onnx-int4")])
def test_transformers_js_on_node_gives_the_labels(bundles, validation_set, logits_here, dtype, variant):
    shutil.copy(TESTS / "clients" / "transformers.mjs", bundles)
    texts = validation_set / str(sentences_for(variant)) / "texts.json"
    output = json.loads(run(NODE, bundles / "transformers.mjs", bundles / "web", dtype, texts))
    assert len(output["answers"]) == sentences_for(variant)
    assert count_flips(output["answers"], logits_here(variant)) <= (0 if dtype == "fp32" else MOST_FLIPS)


@needs_node
@pytest.mark.parametrize("variant", ["onnx-int8", "onnx-fp32"])
def test_onnxruntime_on_node_gives_the_logits(bundles, validation_set, logits_here, variant):
    shutil.copy(TESTS / "clients" / "node.mjs", bundles)
    file = next(m for m in read_bundle(bundles / "web")["models"] if m["variant"] == variant)["file"]
    tokens = validation_set / str(sentences_for(variant)) / "tokens.json"
    output = json.loads(run(NODE, bundles / "node.mjs", bundles / "web", file, tokens))
    require_similar(output["answers"], logits_here(variant), "fp32" if variant == "onnx-fp32" else "int8")


@needs_node
def test_a_bundle_verifies_itself_on_node(bundles, tmp_path):
    output = run(NODE, "verify.mjs", cwd=bundles / "web")
    assert re.search(r"^onnx-int8: golden sentences passed", output, re.MULTILINE)
    assert re.search(r"^onnx-fp32: golden sentences passed", output, re.MULTILINE)
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copytree(bundles / "web", tmp_path / "web")
    golden = json.loads((tmp_path / "web" / "golden.json").read_text())
    golden["logits"]["onnx-int8"][2][0] += 1
    (tmp_path / "web" / "golden.json").write_text(json.dumps(golden))
    failed_run = subprocess.run([NODE, "verify.mjs"], cwd=tmp_path / "web", capture_output=True, text=True, check=False)
    assert failed_run.returncode == 3
    assert "onnx-int8: FAILED: the largest difference" in failed_run.stdout


@needs_node
def test_the_node_code_of_the_readme_runs(bundles):
    readme = (bundles / "web" / "README.md").read_text()
    code = re.search(r"```js\n(.*?)```", readme, re.DOTALL)[1]
    (bundles / "readme.mjs").write_text(code.replace("/path/to/this/folder", str(bundles / "web")))
    output = run(NODE, bundles / "readme.mjs")
    assert output.index("POSITIVE") < output.index("NEGATIVE")


@needs_python
@pytest.mark.parametrize("target", ["python", "web", "other"])
def test_a_bare_python_verifies_a_bundle(bundles, target):
    output = run(PYTHON, "-I", bundles / target / "verify.py")
    assert output.count("golden sentences passed") == (3 if target == "web" else 2)


@needs_python
def test_the_bare_python_has_no_other_package():
    names = ("torch", "transformers", "toolchain", "onnx")
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    assert run(PYTHON, "-I", "-c", code).strip() == "[]"


@needs_python
@pytest.mark.parametrize("variant", ["onnx-int8", "onnx-int8-portable"])
def test_the_runner_gives_the_872_labels(bundles, validation_set, logits_here, variant):
    script = TESTS / "clients" / "bare.py"
    texts = validation_set / str(ALL) / "texts.json"
    labels = json.loads(run(PYTHON, script, bundles / "python", variant, texts))["answers"]
    assert count_flips(labels, logits_here(variant)) == 0  # The client and the test use the same kernels.


@needs_python
def test_the_python_code_of_the_readme_runs_on_a_bare_python(bundles, tmp_path):
    block = re.search(r"```python\n(.*?)```", (bundles / "python" / "README.md").read_text(), re.DOTALL)[1]
    block = block.replace("/path/to/this/folder", str(bundles / "python"))
    (tmp_path / "classify.py").write_bytes((bundles / "python" / "classify.py").read_bytes())
    output = run(PYTHON, "-c", block, cwd=tmp_path)
    assert output.count("POSITIVE") == 2
    line = run(PYTHON, "classify.py", "a charming and often affecting journey .", cwd=bundles / "python")
    assert re.fullmatch(r"POSITIVE\t0\.\d+\ta charming and often affecting journey \.\n", line)


@pytest.mark.skipif(not TEXTS.exists(), reason="needs `make test-clients`")
def test_a_graph_with_the_tokenizer_gives_the_872_labels(reference, validation_set, logits_here, tmp_path):
    order = Order(("onnx-int8",), "python", with_tokenizer=True)
    shipping.ship(reference, order, tmp_path / "b", lambda line: None, no_bar)
    assert "golden sentences passed" in run(TEXTS, "-I", tmp_path / "b" / "verify.py")
    texts = validation_set / str(ALL) / "texts.json"
    output = json.loads(run(TEXTS, TESTS / "clients" / "bare.py", tmp_path / "b", "onnx-int8", texts))
    assert count_flips(output["answers"], logits_here("onnx-int8")) == 0


@needs_phone
def test_the_release_of_a_phone_bundle_reads_both_formats(bundles):
    version = run(PHONE, "-c", "import onnxruntime; print(onnxruntime.__version__)").strip()
    assert version.startswith(read_bundle(bundles / "mobile")["ort_mobile"] + ".")
    output = run(PHONE, "-I", bundles / "mobile" / "verify.py")
    assert output.count("golden sentences passed") == 6


@needs_phone
@pytest.mark.parametrize("target", ["python", "other"])
def test_the_oldest_runtime_of_a_bundle_verifies_it(bundles, target):
    version = run(PHONE, "-c", "import onnxruntime; print(onnxruntime.__version__)").strip()
    assert version.startswith(read_bundle(bundles / target)["onnxruntime"] + ".")
    assert run(PHONE, "-I", bundles / target / "verify.py").count("golden sentences passed") == 2


@needs_phone
@pytest.mark.parametrize(
    ("variant", "scheme"), [("onnx-int8", "int8"), ("onnx-int8-portable", "int8"), ("onnx-fp32", "fp32")]
)
def test_the_release_of_a_phone_bundle_gives_the_logits(bundles, validation_set, logits_here, variant, scheme):
    script = TESTS / "clients" / "old_runtime.py"
    tokens = validation_set / str(sentences_for(variant)) / "tokens.json"
    output = json.loads(run(PHONE, script, bundles / "mobile" / f"{variant}.ort", tokens))
    assert len(output["answers"]) == sentences_for(variant)
    require_similar(output["answers"], logits_here(variant), scheme)


@pytest.mark.parametrize("variant", ["onnx-int8", "onnx-int8-portable", "onnx-fp32"])
def test_both_formats_of_a_phone_bundle_give_the_same_logits_here(bundles, validation_set, variant):
    rows = json.loads((validation_set / str(FEW) / "tokens.json").read_text())
    onnx_session, ort_session = (
        open_session(bundles / "mobile" / f"{variant}.{kind}", "onnx", Place("cpu", 1)) for kind in ("onnx", "ort")
    )
    batches = [pad([row], ("input_ids", "attention_mask"), 0) for row in rows]
    deltas = [float(np.abs(onnx_session.run(batch) - ort_session.run(batch)).max()) for batch in batches]
    assert max(deltas) < 1e-5, sorted(deltas)[-5:]


@pytest.fixture(scope="module")
def short_bundles(reference, tmp_path_factory):
    """Bundles without the golden sentence that is longer than the model's maximum length.

    On an emulated processor, the longest golden sentence takes as much time as all other golden sentences together.
    """
    folder = tmp_path_factory.mktemp("short-bundles")
    if MODULES:
        (folder / "node_modules").symlink_to(MODULES)
    texts = {name: text for name, text in shipping.TEXTS.items() if name != "over-long text"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "TEXTS", texts)
        for target, names in (
            ("python", ("onnx-int8", "onnx-int8-portable")),
            ("mobile", ("onnx-int8",)),
            ("other", ("onnx-std-int8",)),
            ("web", ("onnx-int8",)),
        ):
            shipping.ship(reference, Order(names, target, demo=False), folder / target, lambda line: None, no_bar)
    return folder


@on_each_processor
def test_an_emulated_processor_saturates_only_without_the_option_and_vnni(short_bundles, processor):
    code = (
        "import sys; sys.path.append(sys.argv[1]); "
        "import verify; print(verify.saturates(), verify.saturates(exact=True))"
    )
    output = run(*emulated.python(processor, CLIENTS), "-I", "-B", "-c", code, short_bundles / "python")
    assert output.split() == [str(processor == emulated.AVX2), "False"]


@pytest.mark.parametrize(
    ("processor", "target", "files"),
    [
        pytest.param(emulated.AVX2, "python", ["onnx-int8", "onnx-int8-portable"], marks=needs_avx2),
        pytest.param(emulated.ARM, "python", ["onnx-int8", "onnx-int8-portable"], marks=needs_arm),
        pytest.param(emulated.ARM, "mobile", ["onnx-int8", "onnx-int8.ort"], marks=needs_arm),
    ],
)
def test_a_bundle_verifies_itself_on_other_processors(short_bundles, processor, target, files):
    output = run(*emulated.python(processor, CLIENTS), "-I", short_bundles / target / "verify.py")
    assert re.findall(r"^(.*): golden sentences passed", output, re.MULTILINE) == files


@needs_phone
@needs_avx2
@pytest.mark.parametrize(("target", "files"), [("mobile", 2), ("other", 1)])
def test_the_oldest_release_verifies_a_bundle_with_avx2(short_bundles, target, files):
    output = run(*emulated.program(emulated.AVX2, PHONE), "-I", short_bundles / target / "verify.py")
    assert output.count("golden sentences passed") == files


@needs_node
@needs_avx2
def test_a_bundle_verifies_itself_on_node_with_avx2(short_bundles):
    output = run(*emulated.program(emulated.AVX2, NODE), "verify.mjs", cwd=short_bundles / "web")
    assert re.search(r"^onnx-int8: golden sentences passed", output, re.MULTILINE)


@needs_openvino
@pytest.mark.parametrize(("variant", "scheme"), [("onnx-std", "fp32"), ("onnx-std-int8", "int8")])
def test_openvino_gives_the_logits(bundles, validation_set, logits_here, variant, scheme):
    script = TESTS / "clients" / "openvino_runtime.py"
    file = next(m for m in read_bundle(bundles / "other")["models"] if m["variant"] == variant)["file"]
    tokens = validation_set / str(sentences_for(variant)) / "tokens.json"
    output = json.loads(run(OPENVINO, script, bundles / "other" / file, tokens))
    require_similar(output["answers"], logits_here(variant), scheme)


@needs_openvino
def test_the_openvino_code_of_the_readme_runs(bundles):
    block = re.search(r"```python\n(.*?)```", (bundles / "other" / "README.md").read_text(), re.DOTALL)[1]
    assert run(OPENVINO, "-c", block, cwd=bundles / "other").strip() == "POSITIVE"


@needs_node
def test_the_project_readme_runs_on_node(bundles):
    (bundles / "project.mjs").write_text(snippet("node").replace("/path/to/bundle-web", str(bundles / "web")))
    assert "POSITIVE" in run(NODE, bundles / "project.mjs")


@pytest.fixture
def exported(bundles, tmp_path):
    """A folder with links to the bundles, at the paths that the code of the project's README uses."""
    (tmp_path / "exported" / "reference").mkdir(parents=True)
    for target in ("python", "other"):
        (tmp_path / "exported" / "reference" / f"bundle-{target}").symlink_to(bundles / target)
    return tmp_path


@needs_python
def test_the_project_readme_runs_on_a_bare_python(exported):
    assert "POSITIVE" in run(PYTHON, "-c", snippet("python"), cwd=exported)


@needs_openvino
def test_the_project_readme_runs_in_openvino(exported):
    negative, positive = map(float, re.findall(r"-?\d+\.\d+", run(OPENVINO, "-c", snippet("openvino"), cwd=exported)))
    assert positive > negative


def test_int8_loses_few_answers(logits_here):
    """Compares int8 variants with `onnx-std`, the fp32 graph of standard operators."""
    labels = np.array(inputs.load_embedded().labels)
    correct = {
        v: int((logits_here(v, ALL).argmax(1) == labels).sum())
        for v in ("onnx-std", "onnx-std-int8", "onnx-int8-portable")
    }
    assert correct["onnx-std"] == 789
    assert min(correct.values()) >= 789 - 9  # one percentage point
    for variant in ("onnx-std-int8", "onnx-int8-portable"):
        assert (logits_here(variant).argmax(1) != logits_here("onnx-std", ALL).argmax(1)).mean() <= 0.02


@pytest.fixture(scope="module")
def site(bundles):
    """The address of the web bundle, on a server like `python -m http.server`."""
    with serve(bundles / "web") as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


SCORE_ALL = (TESTS / "clients" / "page.js").read_text()
ANSWER = "document.getElementById('answer').innerText"


def set_offline(browser, *, enabled):
    browser.ask(
        "Network.emulateNetworkConditions", offline=enabled, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )


@needs_chromium
@pytest.mark.web
def test_the_page_works_without_a_network(browser, site):
    browser.show_as()
    browser.open(site)
    assert "onnx-int8 is ready" in browser.run(READY)
    set_offline(browser, enabled=True)
    try:
        browser.run("document.getElementById('text').value = 'a waste of two hours .'")
        browser.run("document.getElementById('classify').focus()")
        browser.press("Enter", 13)
        answer = browser.run(READY)
        assert re.match(r"NEGATIVE\s+\d\d\.\d %\s+POSITIVE\s+\d\.\d %\s+onnx-int8 took \d+(\.\d)? ms", answer), answer
    finally:
        set_offline(browser, enabled=False)
    assert browser.complaints(site) == []


@needs_chromium
@pytest.mark.web
def test_the_page_verifies_every_variant(browser, site):
    browser.open(site)
    browser.run(READY)
    proof = "document.getElementById('proof').innerText"
    for index, variant in enumerate(["onnx-int8", "onnx-fp32", "onnx-int4"]):
        if index:
            browser.run(
                f"(s => {{ s.selectedIndex = {index}; s.dispatchEvent(new Event('change')) }})"
                "(document.getElementById('variant'))"
            )
            assert f"{variant} is ready" in browser.run(READY)
        browser.run("document.getElementById('check').click()")
        browser.run(READY)
        text = browser.run(proof)
        assert text.startswith(f"{variant}: 20 golden sentences and 2 batches match the recorded logits"), text
    assert browser.complaints(site) == []


@needs_chromium
@pytest.mark.web
def test_the_browser_gives_the_872_labels(browser, site, validation_set, logits_here):
    browser.open(site)
    browser.run(READY)
    texts = (validation_set / str(ALL) / "texts.json").read_text()
    labels = browser.run(f"({SCORE_ALL})('q8', {texts})")["answers"]
    assert count_flips(labels, logits_here("onnx-int8")) <= MOST_FLIPS


@needs_chromium
@pytest.mark.web
def test_the_page_of_the_readme_runs(browser, bundles, tmp_path):
    shutil.copytree(bundles / "web", tmp_path / "web")
    block = re.search(r"```html\n(.*?)```", (bundles / "web" / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "web" / "mine.html").write_text(
        "<!doctype html><title>mine</title><link rel=icon href='data:,'>"
        + block.replace("console.log(", "window.said = (")
    )
    with serve(tmp_path / "web") as address:
        browser.open(f"{address}mine.html")
        wait = "(async () => { while (!window.said) await new Promise(r => setTimeout(r, 50)); return window.said })()"
        assert browser.run(wait)[0]["label"] == "POSITIVE"
        assert browser.complaints(address) == []


@needs_chromium
@pytest.mark.web
@pytest.mark.parametrize("settings", [{}, {"scheme": "dark"}, {"width": 360, "height": 740}])
def test_the_page_fits_the_window_and_its_controls_have_names(browser, site, settings):
    browser.show_as(**settings)
    browser.open(site)
    browser.run(READY)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    is_dark = settings.get("scheme") == "dark"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 24, 29)" if is_dark else "rgb(255, 255, 255)"
    )
    # Each control of the demo page has a name and can be reached with the keyboard.
    names = "[...document.querySelectorAll('textarea, select, button')].map(e => (e.labels?.[0] ?? e).innerText)"
    assert browser.run(names) == ["Text", "Variant", "Classify", "Check this bundle"]
    assert browser.run("[...document.querySelectorAll('textarea, select, button')].every(e => e.tabIndex === 0)")


@needs_chromium
@pytest.mark.web
def test_the_page_shows_an_error_where_a_model_is_missing(browser, bundles, tmp_path):
    shutil.copytree(bundles / "web", tmp_path / "web")
    (tmp_path / "web" / "onnx" / "model_quantized.onnx").unlink()
    with serve(tmp_path / "web") as address:
        browser.open(address)
        browser.run("new Promise(r => setTimeout(r, 1500))")
        assert "Error" in browser.run(ANSWER)
