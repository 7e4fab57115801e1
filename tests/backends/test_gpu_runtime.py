"""Tests the real onnxruntime-gpu without a GPU: it lists CUDA as available, but the toolchain refuses the session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.system import hardware

ROOT = Path(__file__).parent.parent.parent
PIN = next(
    line for line in (ROOT / "constraints/gpu.txt").read_text().splitlines() if line.startswith("onnxruntime-gpu==")
)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """Installs the pinned onnxruntime-gpu into a separate folder, which Python searches before this environment."""
    if hardware.missing_cuda() is None:
        pytest.skip("this machine has an NVIDIA GPU, so the toolchain accepts the session")
    folder = tmp_path_factory.mktemp("runtime")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    run = subprocess.run([*pip, "--target", str(folder), PIN], capture_output=True, text=True, timeout=600, check=False)
    if run.returncode:
        pytest.skip(f"{PIN} cannot be installed here: {run.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_a_cuda_session_without_a_gpu_raises_a_provider_error(runtime, built_tiny):
    code = (
        "import sys; from pathlib import Path; import onnxruntime as ort\n"
        "from toolchain.backends import Place, open_session; from toolchain.errors import ProviderError\n"
        "print(ort.__file__, ort.get_available_providers())\n"
        "open_session(Path(sys.argv[1]), 'onnx', Place('cpu', 1)).close()\n"
        "try: open_session(Path(sys.argv[1]), 'onnx', Place('cuda', 1))\n"
        "except ProviderError as error: print('refused:', error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(built_tiny.path("onnx-fp32"))],
        env={**os.environ, "PYTHONPATH": str(runtime)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    first, *output_lines = run.stdout.splitlines()
    assert first.startswith(str(runtime))
    assert "CUDAExecutionProvider" in first
    # ONNX Runtime prints lines about missing libraries, which this test ignores
    refusals = [line for line in output_lines if line.startswith("refused: ")]
    assert len(refusals) == 1
    assert "ONNX Runtime could not start CUDAExecutionProvider and uses CPUExecutionProvider instead" in refusals[0]
