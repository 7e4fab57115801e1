"""Prints the label probabilities that the installed transformers computes: pipeline.py FOLDER TEXTS.json."""

import json
import sys
from pathlib import Path

import transformers

folder, texts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
classify = transformers.pipeline("text-classification", model=folder, top_k=None)
answers = [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]
print(json.dumps({"version": transformers.__version__, "answers": answers}))
