"""Sequences of an engine with recurrent state, run and checked; and a decoder whose state and pages tell which tokens
they were made of, in the place of the compiled one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from amq.errors import AmqError
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine
from amq.runtime.paged_engine import PagedSlot
from helpers.engines import text

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


def fingerprints(tokens: Iterable[int]) -> Tensor:
    """Logits after `tokens`: the state that they make, and what the pages of all of them hold, in one number each."""
    state = cached = 0
    for position, token in enumerate(tokens):
        state = _step(state, position, token)
        cached = (cached + (position + 1) * state) % MODULUS
    return torch.tensor([float(state), float(cached)])


class FakeDecoder:
    """As amq._cpu.Decoder. A state holds a hash of its tokens and their number, a page the hashes of its positions."""

    page_bytes = PAGE * 8
    state_floats = 2
    spare_pages = first_pages = 0

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


OWNERS = ("a", "b")
KINDS, LONGEST = 6, 30
Action = tuple[str, int, int, int, bool]
"""(what to do, kind of text or which slot, how many quarters of a page, number of the owner, whether to reuse)"""
ACTIONS = st.tuples(
    st.sampled_from(["open", "open", "whole", "run", "read", "read", "decode", "fail", "close"]),
    st.integers(0, KINDS - 1), st.integers(1, LONGEST - 4), st.integers(0, 1), st.booleans(),
)  # fmt: skip


class Checked:
    """An engine's sequences, beside what they have to give.

    page: of the engine. expected: the logits [vocabulary] of a fresh run over those tokens. computed: (owner, tokens)
    that were computed so far. read: tokens that were, in all.
    """

    def __init__(self, engine: NativeEngine, page: int, expected: Callable[[list[int]], Tensor]) -> None:
        self.engine, self.expected, self.unit = engine, expected, page // 4
        self.running: dict[PagedSlot, tuple[str, list[int]]] = {}
        self.computed: set[tuple[str, tuple[int, ...]]] = set()
        self.read = 0

    def texts(self) -> list[list[int]]:
        """That have their beginnings in common, some of them longer ones than others."""
        parts = (9 * self.unit, 0), (10 * self.unit, 1)
        return [
            text(*parts[0]) + text(parts[1][0], 1 + kind % 2) + text((LONGEST - 19) * self.unit, 9 + kind)
            for kind in range(KINDS)
        ]

    def open(self, tokens: list[int], new_tokens: int, owner: str = "a", reuse: bool = True) -> PagedSlot | None:
        """tokens: of the prompt, and the `new_tokens` that follow it."""
        slot = self.engine.open(tokens[: len(tokens) - new_tokens], new_tokens, owner, reuse)
        if slot is not None:
            assert reuse or not slot.length
            self.running[slot] = owner, tokens
            self._check_found(slot)
        return slot

    def opened(self, tokens: list[int], new_tokens: int) -> PagedSlot:
        """As `open`, where there is room."""
        slot = self.open(tokens, new_tokens)
        assert slot is not None
        return slot

    def _check_found(self, slot: PagedSlot) -> None:
        owner, tokens = self.running[slot]
        assert slot.tokens == tokens[: slot.length]
        assert not slot.length or (owner, tuple(slot.tokens)) in self.computed

    def catch_up(self, slot: PagedSlot) -> bool:
        before, waits = slot.length, slot.catch_up()
        assert slot.length >= before
        self._check_found(slot)
        return waits

    def left(self, slot: PagedSlot) -> list[int]:
        """Tokens that it has not computed yet."""
        return self.running[slot][1][slot.length :]

    def run(self, parts: Sequence[tuple[PagedSlot, int]]) -> None:
        """A pass over the next tokens of slots: their logits are those of their tokens from the first on."""
        segments = [Segment(slot, self.left(slot)[:count]) for slot, count in parts]
        logits = self.engine.forward(segments)
        for segment, row in zip(segments, logits, strict=True):
            owner, tokens = self.running[segment.slot]
            length = segment.slot.length
            assert torch.equal(row, self.expected(tokens[:length])), "not what a fresh run gives"
            self.computed |= {(owner, tuple(tokens[:n])) for n in range(length + 1)}
            self.read += len(segment.tokens)

    def finish(self, slot: PagedSlot, part: int = 1 << 20) -> int:
        """Runs all that is left of a slot and closes it; returns how many tokens that was."""
        before = self.read
        while self.left(slot):
            self.run([(slot, part)])
        self.close(slot)
        return self.read - before

    def close(self, slot: PagedSlot) -> None:
        self.engine.close(slot)
        del self.running[slot]

    def act(self, action: Action) -> None:
        """Does it, as far as there is something to do it to, and checks that nothing was lost."""
        what, kind, length, owner, flag = action
        slots = list(self.running)
        if what in ("open", "whole"):
            tokens = self.texts()[kind][: (4 + length) * self.unit]
            slot = self.open(tokens, min(length // 2, 8) * self.unit, OWNERS[owner], flag or kind > 1)
            if slot is not None and what == "whole":
                self.finish(slot, length * self.unit)
        elif what == "close" and slots:
            self.close(slots[kind % len(slots)])
        elif what == "read" and slots:
            self._read(1 + kind, 1 + length * self.unit // 2)
        elif what == "fail" and slots and self.left(slots[0]):
            with pytest.raises(AmqError, match="tokens"):
                self.engine.forward([Segment(slots[0], self.left(slots[0])), Segment(slots[-1], [])])
        elif what in ("run", "decode"):
            some = [slot for i, slot in enumerate(slots) if self.left(slot) and (i + kind) % 3]
            if some:
                self.run([(slot, 1 if what == "decode" else length * self.unit) for slot in some])
        self.check()

    def _read(self, passes: int, rows: int) -> None:
        """As a scheduler does."""
        for _ in range(passes):
            going = [slot for slot in self.running if not self.catch_up(slot)]
            assert going, "everyone waits"
            parts = [(slot, rows) for slot in going if self.left(slot)]
            if parts:
                self.run(parts)

    def check(self) -> None:
        """Every state has one use, and every snapshot its page."""
        assert self.engine.states is not None
        pool = self.engine.states.pool
        used = [*pool._running, *pool._kept.values(), *pool._free]
        assert sorted(used) == list(range(pool.n_running + pool.n_kept)) and not pool._reserved
        assert len(pool._running) == len(self.running) and pool.kept <= pool.n_kept
        assert pool._kept.keys() <= self.engine._pool._known.keys() and pool._spare <= pool._kept.keys()
