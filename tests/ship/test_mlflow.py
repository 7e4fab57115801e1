"""Tests of bundles for MLflow: the files that MLflow reads, and MLflow's own loading and serving."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pandas
import pytest
import yaml
from conftest import ROOT, TESTS
from readme_parts import snippet
from servers import free_port

from toolchain.data import inputs
from toolchain.errors import ShippingError
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files.verify import read_bundle
from toolchain.ship.bundles import template_environment
from toolchain.ship.shipping import Order
from toolchain.ship.targets import BUNDLE_FILES, mlflow

PYTHON = ROOT / "exported" / ".cache" / "test-clients" / "mlflow" / "bin" / "python"
SPARK = PYTHON.parents[2] / "spark" / "bin" / "python"
needs_mlflow = pytest.mark.skipif(not PYTHON.exists(), reason="needs `make test-clients`")
needs_spark = pytest.mark.skipif(
    not SPARK.exists() or shutil.which("java") is None, reason="needs Java and `make test-clients SPARK=1`"
)
COUNT = 300
VARIABLES = {"TOOLCHAIN_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(built_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow") / "bundle"
    shipping.ship(built_tiny, Order(("onnx-int8", "onnx-fp32"), "mlflow"), folder, lambda line: None, no_bar)
    return folder


@pytest.fixture(scope="module")
def texts():
    return list(inputs.load_embedded().texts[:COUNT])


@pytest.fixture(scope="module")
def expected(bundle, texts):
    """The answers of the bundle's own runner, one text at a time."""
    code = "import json, sys; from classify import Classifier; classify = Classifier(sys.argv[1])\n"
    code += "print(json.dumps([classify([text])[0] for text in json.load(sys.stdin)]))"
    environment = {**os.environ, **VARIABLES, "PYTHONPATH": str(bundle / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", code, bundle],
        input=json.dumps(texts),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert output.returncode == 0
    return json.loads(output.stdout)


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | VARIABLES


def require_equal_answers(rows, expected):
    assert len(rows) == len(expected) == COUNT
    for row, scores in zip(rows, expected, strict=True):
        best = max(scores, key=scores.get)
        assert row["label"] == best
        assert row["score"] == pytest.approx(scores[best], abs=1e-6)
        assert {label: row[f"score_{label}"] for label in scores} == pytest.approx(scores, abs=1e-6)


def test_mlmodel_describes_the_bundle(bundle):
    body = yaml.safe_load((bundle / "MLmodel").read_text())
    flavor = body["flavors"]["python_function"]
    assert flavor["loader_module"] == "mlflow_model"
    assert (bundle / flavor["code"] / "mlflow_model.py").is_file()
    assert body["flavors"]["onnx"]["data"] == read_bundle(bundle)["models"][0]["file"] == "model.onnx"
    assert json.loads(body["signature"]["inputs"]) == [{"type": "string", "name": "text", "required": True}]
    outputs = json.loads(body["signature"]["outputs"])
    assert [(column["name"], column["type"]) for column in outputs] == [
        ("label", "string"),
        ("score", "double"),
        ("score_NEGATIVE", "double"),
        ("score_POSITIVE", "double"),
    ]
    for name in flavor["env"].values():
        environment = yaml.safe_load((bundle / name).read_text())
        pip = environment["dependencies"][-1]
        assert (pip["pip"] if isinstance(pip, dict) else [pip]) == ["-r requirements.lock"]
    example = json.loads((bundle / body["saved_input_example_info"]["artifact_path"]).read_text())
    serving = json.loads((bundle / body["saved_input_example_info"]["serving_input_path"]).read_text())
    assert serving["dataframe_split"] == example


@pytest.mark.parametrize(
    ("task", "multi_label", "names"),
    [
        ("regression", False, ["score"]),
        ("multi_label_classification", True, ["label", "score_a", "score_\"b'"]),
    ],
)
def test_the_columns_of_the_answers_depend_on_the_task(task, multi_label, names):
    labels = ["score"] if task == "regression" else ["a", "\"b'"]
    columns = mlflow.columns({"task": task, "multi_label": multi_label, "labels": labels})
    assert [column["name"] for column in columns["outputs"]] == names


def test_hostile_labels_stay_names_of_columns():
    labels = ["a: b\n- c", "\u2028\x1b'\"", "é🎬"]
    body = {"task": "single_label_classification", "multi_label": False, "labels": labels, "models": [{"file": "m"}]}
    template = template_environment().get_template("MLmodel.j2")
    page = yaml.safe_load(template.render(bundle=body, mlflow_columns=mlflow.columns(body)))
    assert json.loads(page["signature"]["outputs"]) == mlflow.columns(body)["outputs"]
    assert list(page) == ["flavors", "saved_input_example_info", "signature"]


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("single_label_classification", {"label": "b", "score": 0.75, "score_a": 0.6, "score_b": 0.75}),
        ("multi_label_classification", {"label": "a|b", "score_a": 0.6, "score_b": 0.75}),
        ("regression", {"score": 0.6}),
    ],
)
def test_the_loader_answers_with_the_columns_of_the_signature(monkeypatch, task, answer):
    labels = ["a"] if task == "regression" else ["a", "b"]

    class Classifier:
        def __init__(self, folder):
            self.task, self.labels = task, labels

        def __call__(self, texts):
            return [dict(zip(labels, (0.6, 0.75), strict=False)) for _ in texts]

    monkeypatch.setitem(sys.modules, "classify", types.SimpleNamespace(Classifier=Classifier))
    loader = runpy.run_path(str(BUNDLE_FILES / "mlflow_model.py"))
    model = loader["_load_pyfunc"]("folder")
    answers = model.predict(pandas.DataFrame({"text": ["x", "y"]}, index=[3, 5]))
    assert answers.to_dict("records") == [answer, answer]
    assert list(answers.index) == [3, 5]
    columns = mlflow.columns({"task": task, "multi_label": task.startswith("multi"), "labels": labels})["outputs"]
    assert list(answers) == [column["name"] for column in columns]
    with pytest.raises(ValueError, match="Row 2: the column 'text' holds no text"):
        model.predict(pandas.DataFrame({"text": ["x", None]}))


def test_a_tokenizer_in_the_graph_is_refused(built_tiny, tmp_path):
    order = Order(("onnx-int8",), "mlflow", with_tokenizer=True)
    with pytest.raises(ShippingError, match=r"mlflow\.onnx cannot register the operators"):
        shipping.ship(built_tiny, order, tmp_path / "bundle", lambda line: None, no_bar)


@needs_mlflow
def test_mlflow_loads_the_bundle_and_answers_as_python_does(bundle, texts, expected, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    result = subprocess.run(
        [PYTHON, TESTS / "clients" / "mlflow_model.py", bundle, tmp_path / "texts.json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answers, facts = map(json.loads, result.stdout.splitlines()[-2:])
    require_equal_answers(answers, expected)
    assert facts["inputs"] == ["text"]
    assert facts["outputs"] == list(answers[0])
    assert facts["dtypes"][1:] == ["float64"] * 3
    assert facts["example"] == {"text": ["a charming and often affecting journey ."]}
    assert facts["example_answer"][0].keys() == answers[0].keys()
    assert facts["graph_inputs"] == ["input_ids", "attention_mask"]
    assert "text" in facts["refusal"]
    assert facts["modules"] == []
    assert shipping.verify(bundle)["target"] == "mlflow"  # MLflow wrote no file into the bundle


@needs_mlflow
def test_the_code_of_the_page_runs(bundle):
    code = snippet("mlflow").replace("exported/reference/bundle-mlflow", str(bundle))
    result = subprocess.run([PYTHON, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "score_POSITIVE" in result.stdout


SPARK_CODE = """
import json, sys
import mlflow.pyfunc
from pyspark.errors import PythonException
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
classify = mlflow.pyfunc.spark_udf(spark, sys.argv[1], env_manager="local")
texts = list(enumerate(json.load(sys.stdin)))
table = spark.createDataFrame(texts, ["number", "text"]).repartition(4)
rows = table.withColumn("answer", classify("text")).select("number", "answer.*").orderBy("number").collect()
print(json.dumps([row.asDict() for row in rows]))
try:
    spark.createDataFrame([(None,)], "text string").select(classify("text")).collect()
except PythonException as error:
    print(json.dumps("the column 'text' holds no text" in str(error)))
"""


def run_spark(code, *arguments, **options):
    variables = {"PYSPARK_PYTHON": str(SPARK), "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [SPARK, "-c", code, *arguments]
    result = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_spark
def test_spark_scores_a_table_as_python_does(bundle, texts, expected, tmp_path):
    answers, error = map(
        json.loads, run_spark(SPARK_CODE, bundle, input=json.dumps(texts), cwd=tmp_path).splitlines()[-2:]
    )
    assert [answer.pop("number") for answer in answers] == list(range(COUNT))
    require_equal_answers(answers, expected)
    assert error
    assert shipping.verify(bundle)["target"] == "mlflow"  # Spark wrote no file into the bundle


@needs_spark
def test_the_spark_code_of_the_page_runs(bundle, tmp_path):
    code = snippet("spark").replace("exported/reference/bundle-mlflow", str(bundle))
    assert "score_POSITIVE" in run_spark(code, cwd=tmp_path)


@contextlib.contextmanager
def serving(bundle, folder):
    """Serves the bundle with `mlflow models serve` on loopback, and yields its port."""
    port = free_port()
    command = [PYTHON, "-m", "mlflow", "models", "serve", "--model-uri", bundle, "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=folder,
            env={**environment(), "PATH": f"{PYTHON.parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def post(port, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", content, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@needs_mlflow
def test_the_scoring_server_of_mlflow_answers_as_python_does(bundle, texts, expected, tmp_path):
    with serving(bundle, tmp_path) as port:
        status, example = post(port, (bundle / "serving_input_example.json").read_bytes())
        assert (status, len(example["predictions"])) == (200, 1)
        rows = []
        for start in range(0, COUNT, 50):
            data = [[text] for text in texts[start : start + 50]]
            status, answer = post(port, {"dataframe_split": {"columns": ["text"], "data": data}})
            assert status == 200, answer
            rows += answer["predictions"]
        require_equal_answers(rows, expected)
        for body in ({"dataframe_records": [{"sentence": "a"}]}, {"dataframe_records": [{"text": 1}]}, b"no JSON"):
            status, answer = post(port, body)
            assert status == 400, answer
        assert post(port, {"dataframe_records": [{"text": "a film"}]})[0] == 200
    assert shipping.verify(bundle)["files"] == len(read_bundle(bundle)["files"])
