"""Labels of texts by a bundle's own runner: `python bare.py BUNDLE VARIANT TEXTS.json`."""

import json
import sys
import time
from pathlib import Path

started = time.perf_counter()
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from classify import Classifier  # noqa: E402 (the clock runs)

classify = Classifier(variant=sys.argv[2])
answers, ms, first = [], [], 0.0
for text in json.loads(Path(sys.argv[3]).read_text()):
    before = time.perf_counter()
    shares = classify([text])[0]
    ms.append(1000 * (time.perf_counter() - before))
    answers.append(max(shares, key=shares.get))
    first = first or 1000 * (time.perf_counter() - started)
print(json.dumps({"answers": answers, "ms": ms, "first_ms": first}))
