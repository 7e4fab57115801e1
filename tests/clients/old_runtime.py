"""Prints the logits that an old ONNX Runtime computes from token ids: `python old_runtime.py MODEL TOKENS.json`.

MODEL is an .onnx or an .ort file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
answers = []
for ids in json.loads(Path(sys.argv[2]).read_text()):
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    answers.append([float(x) for x in session.run(None, feed)[0][0]])
print(json.dumps({"answers": answers}))
