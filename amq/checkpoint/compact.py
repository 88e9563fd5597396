"""Experts that agree, written once: `….experts.gate_proj.*` stands for `….gate_proj.0` up to the last one.

A mixture of experts has tens of thousands of linears, and mostly all experts of a layer and role have one format. In
`quantization_config` such a row of experts is one key that ends in `.*`; its shape has three numbers, of which the
first is how many experts there are. Experts that differ are written one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TypeVar

from amq.errors import AmqError
from amq.model.experts import DOWN, GATE, UP

ALL = "*"
MOST_EXPERTS = 1 << 14
"""Of one layer and role: a damaged file names no more."""
_EXPERT = re.compile(rf"(.+\.(?:{'|'.join((GATE, UP, DOWN))}))\.(0|[1-9][0-9]*)")

Value = TypeVar("Value")
Shape = tuple[int, ...]


def split_expert(linear: str) -> tuple[str, int] | None:
    """(name of the row of experts, number of the expert) of the linear of that name; None where it is no expert's."""
    found = _EXPERT.fullmatch(linear)
    return None if found is None else (found[1], int(found[2]))


def rows_of_experts(shapes: Mapping[str, Shape], besides: Iterable[str] = ()) -> dict[str, int]:
    """{row: experts} of the rows whose experts, from 0 on, are all in `shapes` and have one shape.

    besides: linears elsewhere; a row of which one is there is not whole here.
    """
    rows: dict[str, dict[int, Shape]] = {}
    for linear, shape in shapes.items():
        if found := split_expert(linear):
            rows.setdefault(found[0], {})[found[1]] = shape
    split = {_row_of(linear) for linear in besides}
    return {
        row: len(experts)
        for row, experts in rows.items()
        if row not in split and max(experts) == len(experts) - 1 and len(set(experts.values())) == 1
    }


def compact_shapes(shapes: Mapping[str, Shape], rows: Mapping[str, int]) -> dict[str, Shape]:
    """`shapes` with one entry [experts, out_features, in_features] for a row of experts; rows: `rows_of_experts`."""
    whole = {linear: (rows[row], *shape) for linear, shape in shapes.items() if (row := _row_of(linear)) in rows}
    return _compacted({**shapes, **whole}, rows)


def compact_values(values: Mapping[str, str], rows: Mapping[str, int]) -> dict[str, str]:
    """`values` with one entry for a row of experts that have all the same."""
    return _compacted(values, [row for row, n in rows.items() if len({values[f"{row}.{i}"] for i in range(n)}) == 1])


def compact_groups(groups: Sequence[Sequence[str]], rows: Mapping[str, int]) -> list[list[str]]:
    """`groups` of linears with one group for all experts of rows of which each expert has such a group."""
    patterns = [_pattern(group, rows) for group in groups]
    counts = Counter(patterns)
    result: dict[tuple[str, ...], None] = {}  # in the order of the groups, a row's once
    for group, pattern in zip(groups, patterns, strict=True):
        whole = bool(pattern) and counts[pattern] == rows[pattern[0].removesuffix(f".{ALL}")]
        result[pattern if whole else tuple(group)] = None
    return [list(group) for group in result]


def _row_of(linear: str) -> str:
    return (split_expert(linear) or ("", 0))[0]


def _compacted(values: Mapping[str, Value], rows: Container[str]) -> dict[str, Value]:
    """`values` with the first of each of `rows` for all of its experts."""
    result: dict[str, Value] = {}
    for linear, value in values.items():
        row = _row_of(linear)
        result.setdefault(f"{row}.{ALL}" if row in rows else linear, value)
    return result


def _pattern(group: Sequence[str], rows: Mapping[str, int]) -> tuple[str, ...]:
    """The group of rows that `group`, the linears of one expert, is of; empty where it is none."""
    found = [split_expert(linear) for linear in group]
    experts = [pair for pair in found if pair is not None]
    if len(experts) < len(found) or len({number for _, number in experts}) != 1:
        return ()
    named = [row for row, _ in experts]
    same = len({rows.get(row) for row in named}) == 1 and named[0] in rows
    return tuple(f"{row}.{ALL}" for row in named) if same else ()


def expand_shapes(shapes: Mapping[str, Shape], source: str) -> dict[str, tuple[int, int]]:
    """The inverse of `compact_shapes`; raises AmqError, naming the file `source`, where an entry is none."""
    result: dict[str, tuple[int, int]] = {}
    for key, shape in shapes.items():
        row = _row(key)
        if len(shape) != 2 + (row is not None) or (row is not None and not 1 <= shape[0] <= MOST_EXPERTS):
            expected = "[out_features, in_features]" if row is None else f"[experts up to {MOST_EXPERTS}, out, in]"
            raise AmqError(f"{source}: the shape of {key!r} must be {expected}, got {list(shape)}; the file is damaged")
        for linear in [key] if row is None else [f"{row}.{i}" for i in range(shape[0])]:
            if linear in result:
                raise AmqError(f"{source}: {linear!r} has two shapes; the file is damaged")
            result[linear] = (shape[-2], shape[-1])
    return result


def expand_values(values: Mapping[str, Value], shapes: Mapping[str, Shape], source: str) -> dict[str, Value]:
    """The inverse of `compact_values`; shapes: as the file has them, which tell how many experts a row has."""
    result: dict[str, Value] = {}
    for key, value in values.items():
        for linear in _expanded(key, shapes, source):
            if linear in result:
                raise AmqError(f"{source}: {linear!r} has two formats; the file is damaged")
            result[linear] = value
    return result


def expand_groups(
    groups: Iterable[Sequence[str]], shapes: Mapping[str, Shape], source: str
) -> tuple[tuple[str, ...], ...]:
    """The inverse of `compact_groups`."""
    result: list[tuple[str, ...]] = []
    for group in groups:
        columns = [_expanded(key, shapes, source) for key in group]
        if len({len(column) for column in columns}) > 1:
            raise AmqError(f"{source}: shared_inputs has {list(group)}, of unequally many experts; it is damaged")
        result.extend(zip(*columns, strict=True))
    return tuple(result)


def _row(key: str) -> str | None:
    """The row of experts that `key` stands for; None of a single linear."""
    row, _, last = key.rpartition(".")
    return row if last == ALL else None


def _expanded(key: str, shapes: Mapping[str, Shape], source: str) -> list[str]:
    row = _row(key)
    if row is None:
        return [key]
    if key not in shapes:
        raise AmqError(f"{source}: {key!r} stands for experts, but has no shape that says how many; it is damaged")
    return [f"{row}.{i}" for i in range(shapes[key][0])]
