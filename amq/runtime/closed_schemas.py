"""JSON schemas whose objects have the properties that they name, and no others.

JSON schema allows any others where `additionalProperties` does not say false. Few clients say so, and a small model
makes up properties without end (SmolLM2-135M: `"city": "Doe", "city": "Doe", …`). What is valid by the closed schema is
valid by the given one; llama.cpp and xgrammar close objects too.
"""

from __future__ import annotations

from typing import Any

from amq.errors import AmqError

JOINED = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas"}
"""Beside `properties`: several schemas describe one object, and closed ones would exclude each other."""
SAID = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"}
MAPS, LISTS, SINGLE = ("properties", "$defs", "definitions"), ("anyOf", "oneOf", "allOf", "prefixItems"), ("items",)
"""Where a schema has others."""


def closed(schema: Any) -> Any:
    """The schema as it is where it joins several for one object, or says itself what objects may have.

    Raises AmqError for one that is nested too deeply.
    """
    try:
        return schema if _joins(schema) else _close(schema)
    except RecursionError:
        raise AmqError("the JSON schema is nested too deeply to be read") from None


def _joins(part: Any) -> bool:
    if isinstance(part, list):
        return any(map(_joins, part))
    if not isinstance(part, dict):
        return False
    several = part.get("allOf")
    if "properties" in part and JOINED & part.keys() or isinstance(several, list) and len(several) > 1:
        return True
    return any(map(_joins, part.values()))


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    new = dict(schema)
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            new[key] = {name: _close(inner) for name, inner in schema[key].items()}
    for key in LISTS:
        if isinstance(schema.get(key), list):
            new[key] = [_close(inner) for inner in schema[key]]
    for key in SINGLE:
        if key in schema:
            new[key] = _close(schema[key])
    properties, required = schema.get("properties"), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and not SAID & schema.keys():
        if all(isinstance(name, str) and name in properties for name in required):
            new["additionalProperties"] = False
    return new
