"""Recurrent states of sequences, and snapshots of them that other sequences go on from.

A sequence of a model with delta nets or short convolutions carries a state beside its pages of keys and values. Pages
can be shared up to any of them; a state is what all tokens so far have made of it, so a sequence can go on from a known
beginning only where a copy of the state was kept. Such snapshots are taken where a page ends, inside the passes that
come by there, and named by that page's key (amq.runtime.page_keys): whoever finds one has the same owner, model and
tokens. There is room for a few; the one used longest ago goes first, and so does one whose page is evicted. What is not
there is computed again.

Snapshots are taken (`SequenceState.marks`)
- at the last page edge of a prompt that leaves a token of it to be computed: the same prompt, or the next turn;
- where what was known of a prompt ended, or what another prompt that waits has in common with it: a beginning that
  several conversations share, such as instructions, is read twice and never again;
- behind the prompt at every page edge, each in place of the one before: the next turn contains the answer;
- every SPACING pages of a prompt, or at distances of twice, four times … that where there is little room. Nobody has
  asked for these: they are spare, which go before all others and never in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amq.errors import AmqError
from amq.kernels.cpu import empty_bytes
from amq.runtime.page_keys import Key
from amq.util.limits import total_memory

SPACING = 8
"""Pages between snapshots of a prompt, at least."""
FLOAT = 4
"""Bytes of a float32."""
MEMORY_SHARE = 8
"""Snapshots take at most this part (an eighth) of the memory, where nobody says how much."""
LEAST_KEPT = 4
"""Snapshots that a conversation of one user is better for: of its instructions, this turn's prompt and answer, and the
turn's before."""

Snapshots = list[tuple[int, int]]
"""(rows of a segment, number of the state that is to be a copy of its sequence's after them), by rows."""


def room_for(
    state_bytes: int, n_running: int, cache_bytes: int, limit: int | None = None, memory: int | None = None
) -> int:
    """How many snapshots of `state_bytes` are kept for an engine of `n_running` sequences.

    cache_bytes: of its keys and values. limit: bytes that snapshots may take; None: one for each sequence and a quarter
        of cache_bytes more, at least two for each, within MEMORY_SHARE of `memory`, bytes; None: the machine's.
    Raises AmqError for a limit below one snapshot.
    """
    if limit is not None:
        if limit < state_bytes:
            raise AmqError(
                f"a state cache of {limit} bytes holds no state of this model, which takes {state_bytes}: give a "
                "larger one"
            )
        return limit // state_bytes
    wanted = max(n_running + cache_bytes // 4 // state_bytes, 2 * n_running, LEAST_KEPT)
    return min(wanted, (total_memory() if memory is None else memory) // MEMORY_SHARE // state_bytes)


class StatePool:
    """Who has which of the states 0 … n_running + n_kept − 1: up to n_running sequences, and up to n_kept snapshots.

    taken: snapshots so far. found: sequences that went on from one. dropped: snapshots that made room for others, or
    found none.
    """

    def __init__(self, n_running: int, n_kept: int) -> None:
        self.n_running, self.n_kept = n_running, n_kept
        self.taken = self.found = self.dropped = 0
        self._free = list(range(n_running + n_kept - 1, -1, -1))  # low numbers first: memory that was touched
        self._running: set[int] = set()
        self._reserved: set[int] = set()
        self._kept: dict[Key, int] = {}  # spare ones, then the one that was used longest ago first
        self._spare: set[Key] = set()

    @property
    def kept(self) -> int:
        """Snapshots that can be found."""
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def begin(self) -> int:
        """A state for a sequence; `end` gives it back."""
        assert len(self._running) < self.n_running, "more sequences than the pool was made for"
        self._running.add(number := self._free.pop())
        return number

    def end(self, number: int) -> None:
        self._running.remove(number)
        self._free.append(number)

    def find(self, key: Key) -> int:
        """The state behind the page of `key`, which must be there; valid until the next `reserve`."""
        self._kept[key] = number = self._kept.pop(key)  # used last
        self._spare.discard(key)
        self.found += 1
        return number

    def reserve(self, spare: bool = False) -> int | None:
        """Room for a snapshot that a pass is to take, `keep` or `release` ends that; None where there is none."""
        if len(self._kept) + len(self._reserved) == self.n_kept:
            self.dropped += 1
            first = next(iter(self._kept), None)
            if first is None or (spare and first not in self._spare):
                return None
            self.drop(first)
        self._reserved.add(number := self._free.pop())
        return number

    def keep(self, key: Key, number: int, spare: bool = False) -> bool:
        """A reserved state is now that behind the page of `key`; returns whether none was there: one is enough."""
        if key in self._kept:
            self.release(number)
            if not spare:
                self._kept[key] = self._kept.pop(key)
                self._spare.discard(key)
            return False
        self._reserved.remove(number)
        self._kept = {key: number, **self._kept} if spare else {**self._kept, key: number}
        if spare:
            self._spare.add(key)
        self.taken += 1
        return True

    def release(self, number: int) -> None:
        """A reserved state was not written, or cannot be relied on."""
        self._reserved.remove(number)
        self._free.append(number)

    def drop(self, key: Key) -> None:
        """Forgets the snapshot behind the page of `key`, if there is one."""
        if (number := self._kept.pop(key, None)) is not None:
            self._free.append(number)
            self._spare.discard(key)


class SequenceState:
    """Of one sequence; made by `RecurrentStates.begin`.

    number: of its state. prompt: its tokens at the beginning. marks, spare: positions of its prompt where snapshots are
    taken. latest: names the snapshot behind the prompt, which the next one replaces. shared: whether it takes any.
    """

    def __init__(self, number: int, prompt: int, marks: set[int], spare: set[int], shared: bool) -> None:
        self.number, self.prompt, self.marks, self.spare, self.shared = number, prompt, marks, spare, shared
        self.latest: Key | None = None

    def mark(self, position: int) -> None:
        """Another sequence waits for the snapshot at this position, which is not computed yet."""
        self.marks.add(position)
        self.spare.discard(position)


class RecurrentStates:
    """The states of an engine's sequences and their snapshots, in one piece of memory that is touched where it is used.

    state_floats: of one state. page: positions between the places where snapshots can lie.
    memory: float32 [states, state_floats], on `device`, or (None) on pages of the CPU's own.
    """

    def __init__(
        self, state_floats: int, page: int, n_running: int, n_kept: int, device: torch.device | None = None
    ) -> None:
        self.pool, self._page = StatePool(n_running, n_kept), page
        count = n_running + n_kept
        if device is not None:
            self.memory = torch.zeros(count, state_floats, device=device)
        else:
            self.memory = empty_bytes(count * state_floats * FLOAT).view(torch.float32).view(count, state_floats)

    def begin(self, prompt: int, known: int, shared: bool) -> SequenceState:
        """For a sequence whose prompt has `prompt` tokens, `known` full pages of which are in memory."""
        number = self.pool.begin()
        if not shared or not self.pool.n_kept:
            return SequenceState(number, prompt, set(), set(), False)
        last = (prompt - 1) // self._page * self._page
        most = max(1, self.pool.n_kept // (2 * self.pool.n_running))  # half of what is there for each sequence
        spacing = SPACING * self._page
        while last // spacing > most:
            spacing *= 2
        marks = {known * self._page, last}
        return SequenceState(number, prompt, marks, {*range(spacing, last, spacing)} - marks, True)

    def end(self, state: SequenceState) -> None:
        self.pool.end(state.number)

    def restore(self, state: SequenceState, key: Key) -> None:
        """The sequence goes on behind the page of `key`, whose state is known."""
        self.memory[state.number].copy_(self.memory[self.pool.find(key)])

    def plan(self, state: SequenceState, position: int, rows: int) -> Snapshots:
        """The snapshots that a pass takes of a sequence which computes `rows` tokens from `position`; `keep` or
        `release` must follow.

        What lies nearest to the end is the last to go without: a pass may find no room for all.
        """
        if not state.shared:
            return []
        end = position + rows
        places = [mark for mark in state.marks | state.spare if position < mark <= end]
        if (edge := end // self._page * self._page) >= max(state.prompt, position + 1):
            places.append(edge)
            if state.latest is not None:
                self.pool.drop(state.latest)
                state.latest = None
        planned = []
        for place in sorted(places, reverse=True):
            if (number := self.pool.reserve(place in state.spare)) is not None:
                planned.append((place - position, number))
        return planned[::-1]

    def keep(self, state: SequenceState, position: int, planned: Snapshots, keys: Sequence[Key]) -> None:
        """The pass has taken what `plan` said; keys: of the sequence's full pages."""
        for rows, number in planned:
            end = position + rows
            key = keys[end // self._page - 1]
            if self.pool.keep(key, number, end in state.spare) and end >= state.prompt:
                state.latest = key

    def release(self, planned: Snapshots) -> None:
        """The pass has failed."""
        for _, number in planned:
            self.pool.release(number)
