"""Prints the logits that OpenVINO computes from token ids: `python openvino_runtime.py MODEL.onnx TOKENS.json`."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino

# On processors with bf16, OpenVINO computes in bf16 by default.
model = openvino.compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
answers = []
for ids in json.loads(Path(sys.argv[2]).read_text()):
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    answers.append([float(x) for x in model(feed)["logits"][0]])
print(json.dumps({"answers": answers}))
