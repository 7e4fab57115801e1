"""Runs the test models of `release_questions.py` with the installed ONNX Runtime and prints the results as JSON.

    path/to/python benchmarks/release_probe.py FOLDER [SET...]

`releases.py` starts this script in a Python environment with one release of ONNX Runtime. The script needs only
onnxruntime and numpy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

CPU = "CPUExecutionProvider"
MICROSOFT = "com.microsoft"
ABSOLUTE, RELATIVE = 1e-4, 1e-4


def open_session(path, option=None):
    """Opens a session on the CPU; `option` is a key and a value of the session's configuration."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if option:
        options.add_session_config_entry(*option)
    return onnxruntime.InferenceSession(str(path), options, providers=[CPU])


def answer(question, folder):
    """Returns ``right`` if a test model gives its expected outputs, and ``wrong`` if it gives other outputs.

    Returns ``refused`` if ONNX Runtime does not load or run the test model.
    """
    arrays = dict(np.load(folder / question["arrays"]))
    expected = {name[1:]: arrays.pop(name) for name in list(arrays) if name.startswith("=")}
    try:
        outputs = open_session(folder / question["file"], question.get("option")).run(list(expected), arrays)
    except Exception:  # onnxruntime raises a different exception class for each error status
        return "refused"
    matches = (np.allclose(a, b, RELATIVE, ABSOLUTE) for a, b in zip(outputs, expected.values()))  # noqa: B905 (shapes)
    return "right" if all(matches) else "wrong"


def operators():
    """Returns the attributes and the number of inputs of ONNX Runtime's operators with a CPU kernel.

    Returns None if this ONNX Runtime has no functions that list operators.
    """
    if not hasattr(state, "get_all_operator_schema"):
        return None
    schemas = {schema.name: schema for schema in state.get_all_operator_schema() if schema.domain == MICROSOFT}
    return {
        name: {"attributes": sorted(schemas[name].attributes), "inputs": len(schemas[name].inputs)}
        for name in sorted(kernels(MICROSOFT) & set(schemas))
    }


def kernels(domain):
    """Returns the operators of `domain` that have a CPU kernel."""
    defined = state.get_all_opkernel_def()
    return {kernel.op_name for kernel in defined if kernel.provider == CPU and kernel.domain == domain}


def main(folder, sets):
    """Runs the test models in `folder` that belong to the sets `sets`, and prints the results as JSON."""
    questions = json.loads((folder / "questions.json").read_text())
    print(
        json.dumps(
            {
                "version": onnxruntime.__version__,
                "operators": operators(),
                "standard": sorted(kernels("")) if hasattr(state, "get_all_opkernel_def") else None,
                "answers": {name: {each["name"]: answer(each, folder) for each in questions[name]} for name in sets},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
