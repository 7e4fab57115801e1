"""The JSON Schema of recipes, with which an editor completes and checks a recipe."""

from __future__ import annotations

import inspect
import re
from typing import Any

from toolchain.artifacts.steps import STEP_TYPES
from toolchain.recipes.bounds import BOUNDS, setting_names
from toolchain.recipes.record import MAX_BATCH, MAX_THREADS, MAX_VARIANTS, Recipe
from toolchain.ship.targets import TARGETS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NULL = {"type": "null"}
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, which `record.read` decodes; the settings depend on the key ``step``."""
    from pydantic import TypeAdapter

    schema = _adapt(TypeAdapter(Recipe).json_schema())
    bench, ship, variant = (schema["$defs"][name] for name in ("BenchRecord", "ShipRecord", "VariantRecord"))
    schema["properties"]["variants"] |= {"minItems": 1, "maxItems": MAX_VARIANTS}
    ship["properties"]["target"]["enum"] = list(TARGETS)
    bench["properties"]["batch_size"] |= {"minimum": 1, "maximum": MAX_BATCH}
    bench["properties"]["threads"] |= {"minimum": 1, "maximum": MAX_THREADS}
    variant["properties"]["step"]["enum"] = list(STEP_TYPES)
    variant["allOf"] = [
        {
            "if": {"properties": {"step": {"const": step}}, "required": ["step"]},
            "then": {"properties": {"settings": _settings_schema(step)}},
        }
        for step in STEP_TYPES
    ]
    return {"$schema": DIALECT, **schema, "title": "Recipe of the toolchain"}


def _settings_schema(step: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    properties = _adapt(TypeAdapter(STEP_TYPES[step]).json_schema()).get("properties", {})
    settings = {name: properties[name] for name in setting_names(step)}
    for name, bound in BOUNDS[step].items():
        items = {"items": {**settings[name]["items"], **bound["items"]}} if "items" in bound else bound
        settings[name].update(items)
    return {"type": "object", "properties": settings, "additionalProperties": False}


def _adapt(value: Any) -> Any:
    """Returns a schema without null, which TOML lacks, and with the attributes in docstrings as descriptions."""
    if isinstance(value, list):
        return [_adapt(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    table = {key: _adapt(entry) for key, entry in value.items() if (key, entry) != ("default", None) and key != "title"}
    if _NULL in table.get("anyOf", ()):
        choices = [choice for choice in table.pop("anyOf") if choice != _NULL]
        table |= choices[0] if len(choices) == 1 else {"anyOf": choices}
    if "properties" in table and isinstance(table.get("description"), str):
        docstring = inspect.cleandoc(table["description"])
        table["description"] = docstring.split("\n\n")[0]
        for name, text in _ATTRIBUTE.findall(docstring):
            if name in table["properties"]:
                table["properties"][name]["description"] = re.sub(r"\s+", " ", text).replace("``", "`")
    return table
