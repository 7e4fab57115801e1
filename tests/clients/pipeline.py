"""Answers requests with the label probabilities of a text-classification pipeline of transformers.

Each line of standard input is a request: a JSON object with the folder of a model and texts. With session options
(`options`), optimum loads the ONNX model of the folder; without them, transformers loads the PyTorch model. Each line
of standard output is an answer: a JSON object with the probabilities of each text, or with the error.
"""

import contextlib
import json
import sys
import traceback

import transformers


def load_model(folder, options):
    if options is None:
        return {"model": folder}
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification

    session_options = onnxruntime.SessionOptions()
    for key, value in options.items():
        session_options.add_session_config_entry(key, value)
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=session_options)
    return {"model": model, "tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}


def answer(folder, texts, options):
    classify = transformers.pipeline("text-classification", top_k=None, **load_model(folder, options))
    answers = [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]
    return {"version": transformers.__version__, "answers": answers}


for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):  # the libraries' own output must not mix with the answers
        try:
            reply = answer(**json.loads(line))
        except Exception:
            reply = {"error": traceback.format_exc()}
    print(json.dumps(reply), flush=True)
