"""Stands in for Triton's ONNX Runtime backend, which no Python package contains.

Triton loads this file as the model.py of a Python backend with the name onnxruntime. Like the backend of Triton, it
joins the requests of a batch to one tensor, runs the model file that the configuration names, and splits the outputs.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_extensions
import triton_python_backend_utils as triton


def read_tensor(request, name):
    """Returns an input as an array; Triton gives texts as bytes, and ONNX Runtime takes them as str."""
    array = triton.get_input_tensor_by_name(request, name).as_numpy()
    return np.array([text.decode() for text in array], dtype=object) if array.dtype == object else array


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if config.get("model_operations", {}).get("op_library_filename"):
            options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
        file = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [spec["name"] for spec in config["input"]]
        self.outputs = [spec["name"] for spec in config["output"]]

    def execute(self, requests):
        tensors = [[read_tensor(each, name) for name in self.inputs] for each in requests]
        feed = {
            name: np.concatenate(parts) for name, parts in zip(self.inputs, zip(*tensors, strict=True), strict=True)
        }
        ends = np.cumsum([len(parts[0]) for parts in tensors])[:-1]
        rows = [np.split(output, ends) for output in self.session.run(self.outputs, feed)]
        return [
            triton.InferenceResponse(
                [triton.Tensor(name, part) for name, part in zip(self.outputs, parts, strict=True)]
            )
            for parts in zip(*rows, strict=True)
        ]
