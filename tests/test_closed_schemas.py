"""amq.runtime.closed_schemas: objects without other properties, where that makes sense."""

from __future__ import annotations

from typing import Any

import pytest

from amq.errors import AmqError
from amq.runtime.closed_schemas import closed

A: dict[str, Any] = {"properties": {"a": {"type": "integer"}}}
SHUT = {**A, "additionalProperties": False}


def test_objects_are_closed_wherever_a_schema_has_them():
    assert closed(A) == SHUT and "additionalProperties" not in A
    assert closed({"$defs": {"x": A}, "items": A, "properties": {"properties": A, "b": {"anyOf": [A, {}]}}}) == {
        "$defs": {"x": SHUT},
        "items": SHUT,
        "properties": {"properties": SHUT, "b": {"anyOf": [SHUT, {}]}},
        "additionalProperties": False,
    }
    assert closed({"allOf": [A]}) == {"allOf": [SHUT]}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "required": ["b"]},
        {**A, "required": [[]]},
        {**A, "minProperties": 2},
        {**A, "anyOf": [{"properties": {"b": {}}}]},
        {"allOf": [A, {"properties": {"b": {}}}]},
        {"$defs": {"x": A}, "items": {"$ref": "#/$defs/x", "properties": {"b": {}}}},
        {"enum": [A], "default": A, "const": A},
        {"not": A},
    ],
    ids=str,
)
def test_others_stay_as_they_are(schema):
    assert closed(schema) == schema


def test_one_that_is_too_deep():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(AmqError, match="nested too deeply"):
        closed(deep)
