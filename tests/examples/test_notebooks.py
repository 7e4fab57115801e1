"""Tests of the notebooks in `examples/`: they run from beginning to end, and state no figures.

The notebooks run in the environment `notebook` of `make test-clients`. If it is missing, pytest skips these tests.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TESTS, make_checkpoint

from toolchain.data import inputs
from toolchain.results.result_file import ResultFile

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PYTHON = ROOT / "exported" / ".cache" / "test-clients" / "notebook" / "bin" / "python"
needs_notebook = pytest.mark.skipif(not PYTHON.exists(), reason="needs `make test-clients`")
# A figure with its unit; text must refer to the tables instead.
FIGURE = re.compile(r"\d\s*(%|×|ms\b|MB\b|points\b)")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def text_outputs(cells):
    """Returns all outputs of the cells as one text; results are there as HTML or SVG and as plain text."""
    parts = []
    for cell in cells:
        for output in cell.get("outputs", []):
            parts += [output.get("text", ""), *output.get("data", {}).values()]
    return "\n".join("".join(part) for part in parts)


def test_the_folder_has_the_documented_notebooks():
    page = (ROOT / "examples" / "README.md").read_text()
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\]\((\w+\.ipynb)\)", page))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    # Outputs hold times of one machine and its paths; the result files in benchmarks/ are the committed figures.
    code_cells = [cell for cell in read(path) if cell["cell_type"] == "code"]
    assert code_cells
    assert not [cell for cell in code_cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_text_has_no_figures(path):
    for cell in read(path):
        if cell["cell_type"] == "markdown":
            assert not FIGURE.search(source(cell)), source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_the_text_have_a_target(path):
    text = "\n".join(source(cell) for cell in read(path) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def run(name, folder, code):
    """Runs a notebook in `folder` with short benchmarks and changed parameters; returns its cells."""
    output = folder / f"{name}.ipynb"
    command = [PYTHON, TESTS / "clients" / "run_notebook.py", ROOT / "examples" / f"{name}.ipynb", output, code]
    paths = {"PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}", "HOME": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    result = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={**os.environ, **paths, "SHORT_BENCH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return read(output)


def write_rows(path, count, names):
    data = inputs.load_embedded()
    rows = [{"text": data.texts[i], "label": names[data.labels[i]]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@needs_notebook
def test_the_study_builds_measures_and_compares_all_variants(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny", width=64, leaning=30)
    rows = write_rows(tmp_path / "rows.jsonl", 200, ("NEGATIVE", "POSITIVE"))
    # The layers of the tiny model have fewer weights than an exit costs, so exits cost nothing here.
    code = f"""
from toolchain.exits import choice
choice.EXIT_WEIGHTS = 0
MODEL, TRAIN_DATA, RATIOS = {str(checkpoint)!r}, {str(rows)!r}, (0.5,)
EXPORTED, RESULTS = {str(tmp_path / "exported")!r}, {str(tmp_path / "results")!r}
"""
    text = text_outputs(run("compression_study", tmp_path, code))
    (path,) = (tmp_path / "results").rglob("*.json")
    measured = {row.variant: row.status for row in ResultFile.read(path).rows}
    pruned = {"torch-pruned50-mask", "torch-pruned50", "torch-pruned50-int8", "onnx-pruned50-int8"}
    whole = {"torch-fp32", "torch-int8", "onnx-fp32", "onnx-int8", "onnx-exits-int8"}
    assert measured == dict.fromkeys(pruned | whole, "ok")
    # The comparison has the measured and the published rows, and the tables of the findings have both.
    assert "torch-pruned50-mask-int8@cpu [reported]" in text
    assert {"study", "this run", "committed"} <= set(re.findall(r"<th[^>]*>([a-z ]+)</th>", text))
    assert text.count("<svg") == 3


@pytest.mark.slow
@needs_notebook
def test_the_own_classifier_learns_its_labels_and_is_shipped(tmp_path):
    folder = tmp_path / "own"
    code = f"ROWS, EPOCHS, FOLDER = 200, 1, {str(folder)!r}"
    cells = run("own_classifier", tmp_path, code)
    (path,) = (folder / "results").rglob("*.json")
    measured = ResultFile.read(path)
    assert [row.variant for row in measured.rows] == ["torch-fp32", "onnx-fp32", "onnx-int8", "onnx-pruned30-r1-int8"]
    assert all(row.score.value > 0.8 for row in measured.rows)
    assert measured.data["rows"] == 872
    assert (folder / "bundle" / "classify.py").is_file()
    answers = re.findall(r"<td>(praise|criticism)</td>", text_outputs(cells[-1:]))
    assert answers[:2] == ["praise", "criticism"]
    assert Path(folder / "train.csv").read_text().splitlines()[0] == "text,label"
