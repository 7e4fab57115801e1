"""Tests of the examples in the docstrings of the interface: they run, in order, on a tiny model."""

import csv
import doctest
import inspect
import os
import shutil

import pytest
from conftest import DEFAULT_VARIANTS
from sample_results import FP32, INT8, result

import toolchain as tc
from toolchain.compare.report.plots import Plot
from toolchain.data import inputs
from toolchain.models import locations

# These classes only hold values, or belong to other rooms; the methods that return them have examples.
WITHOUT_EXAMPLE = {tc.Artifact, tc.Bundle, tc.Prediction, tc.VariantState, Plot, tc.ToolchainError}
# The Python protocols of these classes are not called by name.
PUBLIC = [getattr(tc, name) for name in tc.__all__ if getattr(tc, name) not in WITHOUT_EXAMPLE]


def methods(kind):
    """Returns the public functions and properties that the class itself defines, by name."""
    return {
        f"{kind.__name__}.{name}": getattr(value, "fget", value)
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }


def examples():
    """Returns the docstrings with examples, by the name of their function or class."""
    found = {each.__name__: each for each in PUBLIC}
    for kind in filter(inspect.isclass, PUBLIC):
        found |= methods(kind)
    return {name: inspect.getdoc(each) or "" for name, each in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, built_tiny):
    """A folder with the artifacts, the data and the result file that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    for name in DEFAULT_VARIANTS:
        shutil.copytree(built_tiny.path(name), folder / "exported" / built_tiny.model / name)
    shutil.copy(built_tiny.exported / built_tiny.model / locations.LOCATION, folder / "exported" / built_tiny.model)
    data = inputs.load_embedded()
    for name, rows in (("train.csv", range(200)), ("validation.csv", range(200, 220))):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((data.texts[i], data.labels[i]) for i in rows)])
    results = folder / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "example.json").write_text(result(FP32, INT8).to_json())
    previous = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(previous)


def test_every_public_function_and_method_has_an_example():
    properties = {"Classifier.labels"}
    classes = {kind.__name__ for kind in PUBLIC if inspect.isclass(kind)} - {"Classifier"}
    assert {name for name, text in examples().items() if ">>>" not in text} == properties | classes


@pytest.mark.parametrize("name", [name for name, text in examples().items() if ">>>" in text])
def test_an_example_runs(name, folder, built_tiny, short_bench, monkeypatch):
    # The layers of the tiny model have fewer weights than an exit costs, so exits cost nothing here.
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 0)
    # Its weights are random: it is sure of nothing, and its accuracy with exits differs from one processor to another.
    monkeypatch.setattr("toolchain.exits.choice.CONFIDENCES", (0.5,))
    text = examples()[name].replace("my-checkpoint", built_tiny.model).replace("max_drop=1.0", "max_drop=50")
    test = doctest.DocTestParser().get_doctest(text, {"tc": tc}, name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries > 0
