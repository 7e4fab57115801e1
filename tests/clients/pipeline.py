"""Prints the label probabilities of a text-classification pipeline: pipeline.py FOLDER TEXTS.json [OPTIONS].

With OPTIONS, optimum loads the ONNX model of FOLDER; without OPTIONS, transformers loads the PyTorch model. OPTIONS is
a JSON object of session options.
"""

import json
import sys
from pathlib import Path

import transformers

folder, texts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
settings = {"model": folder}
if len(sys.argv) > 3:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification

    options = onnxruntime.SessionOptions()
    for key, value in json.loads(sys.argv[3]).items():
        options.add_session_config_entry(key, value)
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=options)
    settings = {"model": model, "tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}
classify = transformers.pipeline("text-classification", top_k=None, **settings)
answers = [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]
print(json.dumps({"version": transformers.__version__, "answers": answers}))
