"""Olive: `olive auto-opt` with int8 precision for the CPU; the toolchain's ONNX Runtime runs the model.

Olive exports the checkpoint, optimises the graph with ONNX Runtime's optimiser for transformers, and quantises it
dynamically. Its newer command, `olive optimize`, chooses passes for language models, so it does not fit a classifier.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engines.sources import Sources, new_folder, run


def build(sources: Sources, out: Path) -> None:
    """Writes the int8 model."""
    command = [sys.executable, "-m", "olive", "auto-opt", "-m", sources.checkpoint, "-t", "text-classification"]
    options = ["--device", "cpu", "--provider", "CPUExecutionProvider", "--precision", "int8", "--disable_telemetry"]
    subprocess.run([*command, *options, "-o", out / "result"], check=True, cwd=out)
    (model,) = (out / "result").rglob("*.onnx")
    model.rename(new_folder(out, "olive-int8") / "model.onnx")


if __name__ == "__main__":
    run(build)
