"""A decoder whose state and pages tell which tokens they were made of, in the place of the compiled one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

PAGE = 4
MODULUS = 2**24 - 3
"""Whole numbers below it are exact in float32."""
Memory = tuple[int, int]
"""(address, bytes)"""


def _array(memory: Memory, dtype: Any) -> Any:
    """A writable view."""
    address, size = memory
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype) if size else np.empty(0, dtype)


def _step(state: int, position: int, token: int) -> int:
    return (state * 31 + token * 7 + position + 1) % MODULUS


def fingerprints(tokens: Iterable[int]) -> tuple[float, float]:
    """Logits after `tokens`: the state that they make, and what the pages of all of them hold, in one number each."""
    state = cached = 0
    for position, token in enumerate(tokens):
        state = _step(state, position, token)
        cached = (cached + (position + 1) * state) % MODULUS
    return float(state), float(cached)


class FakeDecoder:
    """As amq._cpu.Decoder. A state holds a hash of its tokens and their number, a page the hashes of its positions."""

    page_bytes = PAGE * 8
    state_floats = 2

    def __init__(self, **model: Any) -> None:
        self.model = model

    def forward(
        self, tokens: Memory, segments: Sequence[Any], wanted: Sequence[int], logits: Memory, cache: Memory,
        states: Memory, threads: int, isa: str,
    ) -> None:  # fmt: skip
        if any(rows < 1 for rows, *_ in segments):
            raise ValueError("a segment has no tokens")
        given, pages = _array(tokens, np.int32), _array(cache, np.int64).reshape(-1, PAGE)
        kept, made = _array(states, np.float32).reshape(-1, self.state_floats), list[tuple[float, float]]()
        numbers = [segment[4] for segment in segments] + [number for segment in segments for _, number in segment[5]]
        assert len(set(numbers)) == len(numbers), "a state is written twice"
        for rows, position, table, _, number, snapshots in segments:
            own = pages[_array(table, np.int32)].copy()
            state, length = kept[number].tolist() if position else (0, 0)
            assert length == position, "the state of another position"
            after = dict(snapshots)
            for row in range(rows):
                state = _step(int(state), position + row, int(given[len(made)]))
                own.reshape(-1)[position + row] = state
                pages[_array(table, np.int32)[(position + row) // PAGE], (position + row) % PAGE] = state
                cached = sum((i + 1) * int(value) for i, value in enumerate(own.reshape(-1)[: position + row + 1]))
                made.append((float(state), float(cached % MODULUS)))
                if row + 1 in after:
                    kept[after[row + 1]] = state, position + row + 1
            kept[number] = state, position + rows
        out = _array(logits, np.float32).reshape(-1, 2)
        for place, row in enumerate(wanted):
            out[place] = made[row]
