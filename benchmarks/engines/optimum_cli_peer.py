"""optimum-cli: two int8 models, one quantised per tensor and one per channel, both with `--avx512_vnni`.

The toolchain's ONNX Runtime runs the models. optimum-cli first exports an fp32 graph of its own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from engines.sources import Sources, run


def build(sources: Sources, out: Path) -> None:
    """Exports the checkpoint and writes both int8 models."""
    exported = sources.export_with_optimum(out / "exported").parent
    for name, options in (("optimum-cli-int8", []), ("optimum-cli-int8-per-channel", ["--per_channel"])):
        quantize = [sources.optimum_cli, "onnxruntime", "quantize", "--onnx_model", exported, "--avx512_vnni", *options]
        subprocess.run([*quantize, "-o", out / name], check=True)
        (out / name / "model_quantized.onnx").rename(out / name / "model.onnx")


if __name__ == "__main__":
    run(build)
