"""Tests of models that `torch.compile` compiles: equal logits for every shape, and an error without a C++ compiler."""

import re
import subprocess
import sys

import numpy as np
import pytest

from toolchain.artifacts.names import VariantName
from toolchain.backends import Place, open_session
from toolchain.backends.compiled import COMPILER, CompiledSession
from toolchain.build.pipeline import ensure
from toolchain.errors import ProviderError, UnknownVariantError

PLACE = Place("cpu", 1)


def batch(rows, tokens):
    ids = np.arange(1, rows * tokens + 1).reshape(rows, tokens)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def compiled_workspace(built_tiny):
    ensure(built_tiny, ["torch-compile"], {}, lambda line: None)
    return built_tiny


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits_for_every_shape(compiled_workspace):
    original = open_session(compiled_workspace.path("torch-fp32"), "torch", PLACE)
    compiled = open_session(compiled_workspace.path("torch-compile"), "torch-compile", PLACE)
    for rows, tokens in ((1, 1), (1, 25), (2, 25), (3, 7)):
        logits = compiled.run(batch(rows, tokens))
        assert np.abs(logits - original.run(batch(rows, tokens))).max() < 1e-5
    assert compiled.resident(batch(2, 9))().shape == (2, 2)
    assert compiled.facts() == {**original.facts(), "compiled": "dynamic shapes"}


@pytest.mark.slow
def test_a_compiled_variant_has_the_weights_and_facts_of_its_parent(compiled_workspace):
    compiled, parent = (compiled_workspace.load(name) for name in ("torch-compile", "torch-fp32"))
    assert compiled.manifest.files == parent.manifest.files
    assert compiled.manifest.facts["parameters"] == parent.manifest.facts["parameters"]
    assert compiled.manifest.validation["passed"]


@pytest.mark.parametrize("variables", [{"PATH": "."}, {"CXX": "no-such-compiler"}])
def test_without_a_compiler_the_session_gives_an_error_with_a_hint(built_tiny, monkeypatch, variables):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ProviderError, match=f"this machine has no {re.escape(variables.get('CXX', COMPILER))}"
    ) as error:
        CompiledSession(built_tiny.path("torch-fp32"), PLACE)
    assert "g++" in error.value.hint


@pytest.mark.slow
def test_sessions_in_one_process_never_reach_the_limit_of_compilations(compiled_workspace):
    """PyTorch compiles a function at most 8 times in a process, and each of these sessions needs 3 compilations."""
    original = open_session(compiled_workspace.path("torch-fp32"), "torch", PLACE)
    for _ in range(3):
        session = open_session(compiled_workspace.path("torch-compile"), "torch-compile", PLACE)
        for rows, tokens in ((1, 1), (1, 25), (2, 25)):
            difference = session.run(batch(rows, tokens)) - original.run(batch(rows, tokens))
            assert np.abs(difference).max() < 1e-5
        session.close()


@pytest.mark.slow
def test_a_failing_compiler_gives_an_error_with_a_hint(built_tiny, monkeypatch, tmp_path):
    """The compiler's result is cached in a process and on the disk, so the test needs a new process and folder."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from toolchain.backends import Place; from toolchain.backends.compiled import CompiledSession\n"
        "from toolchain.errors import ProviderError\n"
        "session = CompiledSession(Path(sys.argv[1]), Place('cpu', 1))\n"
        "ids = np.ones((1, 5), np.int64)\n"
        "try: session.run({'input_ids': ids, 'attention_mask': ids})\n"
        "except ProviderError as error: print(error.cause)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, built_tiny.path("torch-fp32")], capture_output=True, text=True, check=False
    )
    assert completed.stdout.startswith("PyTorch cannot compile this model: "), completed.stderr


def test_the_name_of_a_compiled_variant_omits_fp32():
    assert VariantName("torch-compile").with_parts(scheme="bf16") == "torch-compile-bf16"
    assert VariantName("torch-compile").with_parts(pruned=50) == "torch-compile-pruned50"
    with pytest.raises(UnknownVariantError):
        VariantName("torch-compile-fp32")
