"""Loads a bundle with MLflow, and answers lines of JSON texts with lines of JSON rows.

Arguments: the folder of the bundle, and a file with a JSON list of texts. The last line describes the model.
"""

import json
import sys

import mlflow.models
import mlflow.onnx
import mlflow.pyfunc
import pandas as pd

folder, texts_file = sys.argv[1:]
with open(texts_file) as file:
    texts = json.load(file)
model = mlflow.pyfunc.load_model(folder)
answers = model.predict(pd.DataFrame({"text": texts}))
print(answers.to_json(orient="records", double_precision=15))
signature = mlflow.models.get_model_info(folder).signature
example = mlflow.models.Model.load(folder).load_input_example(folder)
try:
    model.predict(pd.DataFrame({"text": [1]}))
    refusal = ""
except Exception as error:
    refusal = str(error)
print(
    json.dumps(
        {
            "inputs": signature.inputs.input_names(),
            "outputs": signature.outputs.input_names(),
            "dtypes": [str(dtype) for dtype in answers.dtypes],
            "example": example.to_dict("list"),
            "example_answer": model.predict(example).to_dict("records"),
            "graph_inputs": [value.name for value in mlflow.onnx.load_model(folder).graph.input],
            "refusal": refusal,
            "modules": sorted(name for name in sys.modules if name in ("toolchain", "torch", "transformers")),
        }
    )
)
