"""amq.util.records: every wrong file is one error with its place; nothing else comes out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest

from amq.errors import AmqError
from amq.util.records import check_range, parse_record, read_record


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "n"

    def __post_init__(self) -> None:
        check_range(self, "size", most=100)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    losses: dict[str, float] = field(default_factory=dict)
    shape: tuple[int, int] | None = None


WRONG = {
    "no object": ([], "expected `object`, got `array`"),
    "missing": ({}, "missing required field `inner`"),
    "text for number": ({"inner": {"size": "3"}}, r"\$\.inner\.size: expected `int`, got `str`"),
    "boolean for number": ({"inner": {"size": True}}, r"\$\.inner\.size: expected `int`, got `bool`"),
    "float for number": ({"inner": {"size": 3.0}}, "expected `int`, got `float`"),
    "zero": ({"inner": {"size": 0}}, r"\$\.inner: expected size from 1 to 100, got 0"),
    "huge": ({"inner": {"size": 1 << 200}}, "got a number of 201 bits"),
    "no float either": ({"inner": {"size": 10**400}}, "got a number of 1329 bits"),
    "short shape": ({"inner": {"size": 3}, "shape": [3]}, r"\$\.shape: expected `array` of length 2, got 1"),
    "half a character": ({"inner": {"size": "\ud800"}}, "half a character"),
    "text for a loss": ({"inner": {"size": 3}, "losses": {"a": "x"}}, "expected `float`, got `str`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named_with_its_place(tmp_path, case):
    data, message = WRONG[case]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    with pytest.raises(AmqError, match=message) as raised:
        read_record(path, Outer)
    assert str(path) in str(raised.value)


def test_a_right_file_is_read_and_unknown_keys_are_ignored():
    found = parse_record({"inner": {"size": 3}, "losses": {"a": 1}, "shape": [2, 3], "new": 1}, Outer, "x")
    assert found == Outer(Inner(3), {"a": 1.0}, (2, 3))


UNREADABLE = {
    "brackets": "[" * 200_000,
    "digits": '{"inner": ' + "1" * 5000 + "}",
    "NaN": '{"inner": {"size": 3}, "losses": {"a": NaN}}',
    "cut": '{"inner": {"siz',
    "empty": "",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_json_is_named(tmp_path, case):
    path = tmp_path / "file.json"
    path.write_text(UNREADABLE[case])
    with pytest.raises(AmqError, match="file.json is not valid JSON"):
        read_record(path, Outer)


def test_infinity_is_read_where_it_is_asked_for(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"limits": [0.0, Infinity]}')
    assert read_record(path, dict[str, list[float]], floats=True) == {"limits": [0.0, math.inf]}
