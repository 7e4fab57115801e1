"""Prints the labels that the runner inside a bundle computes: `python bare.py BUNDLE VARIANT TEXTS.json`."""

import json
import sys
import time
from pathlib import Path

start = time.perf_counter()
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from classify import Classifier  # noqa: E402 (the measured time includes this import)

classify = Classifier(variant=sys.argv[2])
answers, times_ms, first_ms = [], [], 0.0
for text in json.loads(Path(sys.argv[3]).read_text()):
    text_start = time.perf_counter()
    probabilities = classify([text])[0]
    times_ms.append(1000 * (time.perf_counter() - text_start))
    answers.append(max(probabilities, key=probabilities.get))
    first_ms = first_ms or 1000 * (time.perf_counter() - start)
print(json.dumps({"answers": answers, "ms": times_ms, "first_ms": first_ms}))
