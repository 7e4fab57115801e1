"""Prints what KServe's own types do not accept in files of an InferenceService, as JSON: file → list of problems.

The types come from the packages kserve and kubernetes, whose classes state the names and types of all fields.
"""

import json
import re
import sys
from pathlib import Path

import kserve
import kubernetes.client
import yaml

PRIMITIVES = {"str": str, "int": int, "bool": bool, "object": object}


def problems(value, kind, path):
    """Yields the path of each field that does not exist, and of each value of another type."""
    if match := re.fullmatch(r"[lL]ist\[(.*)\]", kind):
        for index, item in enumerate(value if isinstance(value, list) else [None]):
            yield from problems(item, match[1], f"{path}[{index}]")
    elif match := re.fullmatch(r"[dD]ict[(\[]str, (.*)[)\]]", kind):
        for key, item in value.items():
            yield from problems(item, match[1], f"{path}.{key}")
    elif kind in PRIMITIVES:
        if not isinstance(value, PRIMITIVES[kind]):
            yield f"{path}: {value!r} is no {kind}"
    elif not isinstance(value, dict):
        yield f"{path}: {value!r} is no {kind}"
    else:
        model = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        for key, item in value.items():
            if key in names:
                yield from problems(item, model.openapi_types[names[key]], f"{path}.{key}")
            else:
                yield f"{path}.{key}: {kind} has no such field"


services = {file: yaml.safe_load(Path(file).read_text()) for file in sys.argv[1:]}
print(json.dumps({file: list(problems(each, "V1beta1InferenceService", "service")) for file, each in services.items()}))
