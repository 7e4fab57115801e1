"""OpenVINO: its runtime runs the toolchain's `onnx-std`, and the int8 model that NNCF builds from `onnx-std`.

NNCF, OpenVINO's compression tool, quantises the trained model with its settings for transformers, which use
SmoothQuant.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, new_folder, run


class OpenVinoSession(EngineSession):
    """A `Session` on OpenVINO's CPU plugin, with default settings except the threads and the latency hint."""

    def __init__(self, folder: Path, place: Any) -> None:
        import openvino

        file = next(path for name in ("model.xml", "model.onnx") if (path := folder / name).is_file())
        options = {"INFERENCE_NUM_THREADS": place.threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(file, "CPU", options)
        self._request = model.create_infer_request()
        precision = str(model.get_property("INFERENCE_PRECISION_HINT"))
        self._facts = {"provider": "OpenVINO CPU", "threads": place.threads, "precision": precision}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        return self._request.infer(batch)[0].copy()


def build(sources: Sources, out: Path) -> None:
    """Writes the fp32 and the int8 model."""
    import nncf
    import numpy as np
    import openvino

    def batch(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}

    shutil.copyfile(sources.graph, new_folder(out, "openvino-fp32") / "model.onnx")
    rows = sources.read_calibration()
    data = nncf.Dataset(rows, batch)
    quantized = nncf.quantize(
        openvino.convert_model(sources.graph), data, subset_size=len(rows), model_type=nncf.ModelType.TRANSFORMER
    )
    openvino.save_model(quantized, new_folder(out, "openvino-int8") / "model.xml")


if __name__ == "__main__":
    run(build)
