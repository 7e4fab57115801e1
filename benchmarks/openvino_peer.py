"""A benchmark session on OpenVINO, and a script that builds an int8 model with NNCF, OpenVINO's compression tool.

    python openvino_peer.py MODEL.onnx TOKENS.json OUT.xml

The script needs an environment with the packages in `PACKAGES`. NNCF quantises the trained model with NNCF's settings
for transformers, which use SmoothQuant. NNCF calibrates on the sentences of TOKENS.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0")
SITE = "OPENVINO_SITE"  # the environment variable OPENVINO_SITE holds the path of the folder of OpenVINO's packages


class OpenVinoSession:
    """A `Session` on OpenVINO's CPU plugin, with default settings except the threads and the latency hint."""

    def __init__(self, folder: Path, place: Any) -> None:
        # OpenVINO's folder is the last in `sys.path`, so Python prefers the packages of the running environment.
        sys.path.append(os.environ[SITE])
        import openvino

        file = next(path for name in ("model.xml", "model.onnx") if (path := folder / name).is_file())
        options = {"INFERENCE_NUM_THREADS": place.threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = openvino.Core().compile_model(file, "CPU", options)
        self._request = self._model.create_infer_request()
        self._threads = place.threads

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        return self._request.infer(batch)[0].copy()

    def resident(self, batch: dict[str, Any]) -> Callable[[], object]:
        """See `Session.resident`."""
        return lambda: self._request.infer(batch)

    def facts(self) -> dict[str, Any]:
        """Returns the session's provider, number of threads and precision."""
        precision = self._model.get_property("INFERENCE_PRECISION_HINT")
        return {"provider": "OpenVINO CPU", "threads": self._threads, "precision": str(precision)}

    def close(self) -> None:
        """See `Session.close`."""
        del self._request, self._model


def main(model: str, tokens: str, out: str) -> None:
    """Quantises the ONNX file `model` and saves the int8 model as `out`."""
    import nncf
    import numpy as np
    import openvino

    def batch(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}

    rows = json.loads(Path(tokens).read_text())
    data = nncf.Dataset(rows, batch)
    quantized = nncf.quantize(
        openvino.convert_model(model), data, subset_size=len(rows), model_type=nncf.ModelType.TRANSFORMER
    )
    openvino.save_model(quantized, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
