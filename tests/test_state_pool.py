"""Snapshots of recurrent states: whatever a sequence goes on from is what it would have computed, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import text
from helpers.states import ACTIONS, PAGE, Action, Checked, FakeDecoder, fingerprints
from hypothesis import given, settings
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.runtime import native_engine, state_pool
from amq.runtime.native_engine import NativeEngine
from amq.runtime.state_pool import LEAST_KEPT, RecurrentStates, StatePool, room_for

CONTEXT, SEQUENCES = 32, 3


@contextmanager
def engines() -> Iterator[Callable[..., NativeEngine]]:
    """Makes engines around a FakeDecoder, with few positions between snapshots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_engine, "cpu_module", lambda: SimpleNamespace(Decoder=FakeDecoder, PAGE=PAGE))
        patch.setattr(state_pool, "SPACING", 2)

        def make(kept: int | None = 4, sequences: int = SEQUENCES, context: int = CONTEXT) -> NativeEngine:
            spec = SimpleNamespace(vocabulary=2, ropes=())
            record = SimpleNamespace(group_size=32)
            weights: Any = SimpleNamespace(
                keep=[], spec=spec, held={}, bytes=0, checkpoint=SimpleNamespace(record=record)
            )
            limit = None if kept is None else kept * FakeDecoder.state_floats * 4
            return NativeEngine(weights, context, {}, "fake", sequences, 1, state_cache=limit)

        yield make


def checked(engine: NativeEngine) -> Checked:
    return Checked(engine, PAGE, fingerprints)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 6), st.lists(ACTIONS, min_size=20, max_size=60))
def test_whatever_is_found_is_what_a_fresh_run_gives(kept: int, actions: list[Action]) -> None:
    """Sequences of two owners side by side, read in parts, in a cache that evicts all the time."""
    with engines() as make:
        one = checked(make(kept))
        for action in actions:
            one.act(action)
        for slot in list(one.running):
            one.finish(slot)
        one.check()
        assert one.engine.cached_tokens()[0] == 0


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3), st.lists(st.tuples(st.sampled_from("brskdfe"), st.integers(0, 5)), max_size=60))
def test_states_are_numbers_with_one_use_each(n_kept: int, actions: list[tuple[str, int]]) -> None:
    pool, running, reserved = StatePool(2, n_kept), list[int](), list[int]()
    names = [bytes([i]) for i in range(6)]
    for what, which in actions:
        if what == "b" and len(running) < 2:
            running.append(pool.begin())
        elif what == "e" and running:
            pool.end(running.pop(which % len(running)))
        elif what in "rs":
            number, spare = pool.reserve(what == "s"), what == "s"
            assert (number is None) == (len(reserved) == n_kept) or (spare and number is None)
            reserved += [] if number is None else [number]
        elif what == "k" and reserved:
            new = names[which] not in pool
            assert pool.keep(names[which], reserved.pop(0), which % 2 == 0) == new and names[which] in pool
        elif what == "d":
            pool.drop(names[which])
            assert names[which] not in pool
        elif what == "f" and names[which] in pool:
            assert pool.find(names[which]) not in {*running, *reserved}
        elif reserved:
            pool.release(reserved.pop())
        held = [*running, *reserved, *(pool._kept[name] for name in names if name in pool)]
        assert len(set(held)) == len(held) and sorted([*held, *pool._free]) == list(range(2 + n_kept))
        assert pool.kept + len(reserved) <= n_kept


def test_the_snapshot_used_longest_ago_makes_room() -> None:
    pool = StatePool(1, 2)
    for name in (b"a", b"b"):
        number = pool.reserve()
        assert number is not None and pool.keep(name, number)
    pool.find(b"a")
    number = pool.reserve()
    assert number is not None and b"a" in pool and b"b" not in pool
    assert not pool.keep(b"a", number) and (pool.taken, pool.found, pool.dropped, pool.kept) == (2, 1, 1, 1)


@pytest.mark.parametrize("kept", [None, 4])
def test_a_conversation_goes_on_where_it_ended(kept: int | None) -> None:
    """Ten turns: each reads what is new in it, and what stands behind the last page edge."""
    with engines() as make:
        one = checked(make(kept, 1, 512))
        tokens: list[int] = []
        for turn in range(10):
            prompt = tokens + [turn + 2] * 13
            tokens = prompt + [turn + 3] * 15
            slot = one.opened(tokens, 15)
            begin = slot.length
            assert begin == max(len(prompt) - 13, 0) // PAGE * PAGE
            assert one.finish(slot, 5) == len(tokens) - begin
            one.check()


def test_a_turn_without_the_answer_goes_on_from_the_prompt() -> None:
    """As templates leave out what a model thought in earlier turns."""
    with engines() as make:
        one = checked(make(4, context=64))
        first = one.opened([1] * 23 + [5] * 10, 10)
        one.finish(first)
        second = one.opened([1] * 23 + [6] * 10, 2)
        assert second.length == 20


def test_what_conversations_have_in_common_is_read_twice() -> None:
    with engines() as make:
        one = checked(make(3, 1, 64))
        lengths = []
        for kind in range(2, 6):
            slot = one.opened([1] * 22 + [kind] * 20, 5)
            lengths.append(slot.length)
            one.finish(slot, 7)
        assert lengths == [0, 0, 20, 20]


def test_requests_that_come_at_once_read_a_common_beginning_once() -> None:
    """The first takes a snapshot where the others' prompts part from its own, and they wait for it."""
    with engines() as make:
        one = checked(make(6, 4, 64))
        tokens = [[1] * 22 + [kind] * 20 for kind in (2, 2, 3)]
        slots = [one.opened(each, 5) for each in (*tokens, [9] * 42)]
        assert [one.catch_up(slot) for slot in slots] == [False, True, True, False]
        assert [one.catch_up(slot) for slot in slots] == [False, True, True, False]  # asked again before the pass
        one.run([(slots[0], 18), (slots[3], 5)])
        assert [one.catch_up(slot) for slot in slots] == [False, True, True, False]
        one.run([(slots[0], 10)])
        assert [one.catch_up(slot) for slot in slots[:3]] == [False, True, False]
        assert [slot.length for slot in slots] == [28, 20, 20, 5]
        one.close(slots[0])  # who was waited for is gone
        assert [one.catch_up(slot) for slot in slots[1:3]] == [False, False]
        for slot in slots[1:]:
            one.finish(slot)
        one.check()


def test_without_room_for_snapshots_everything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with engines() as make:
        monkeypatch.setattr(state_pool, "total_memory", lambda: 0)
        one = checked(make(None))
        for _ in range(2):
            slots = [one.opened(text(30), 5) for _ in range(2)]
            assert [(slot.length, one.catch_up(slot)) for slot in slots] == [(0, False)] * 2
            one.run([(slot, 30) for slot in slots])
            for slot in slots:
                one.close(slot)
            one.check()
        assert one.engine.states is not None and one.engine.states.pool.dropped == 0


def test_text_of_nobody_takes_no_snapshots() -> None:
    with engines() as make:
        engine = make()
        tokens = text(32)
        logits = engine.all_logits(tokens)
        assert torch.equal(logits, torch.stack([fingerprints(tokens[: n + 1]) for n in range(32)]))
        assert engine.states is not None and engine.states.pool.taken == 0


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_pool, "total_memory", lambda: 8000)
    assert room_for(10, 3, 400) == 3 + 10
    assert room_for(10, 3, 0) == 6 and room_for(10, 1, 0) == LEAST_KEPT
    assert room_for(100, 3, 10**6) == 10  # an eighth
    assert room_for(10, 3, 400, 75) == 7
    with pytest.raises(AmqError, match="a state cache of 9 bytes holds no state of this model, which takes 10"):
        room_for(10, 3, 400, 9)


def test_snapshots_of_a_long_prompt_lie_further_apart() -> None:
    """So that one prompt does not evict what all others have."""
    states = RecurrentStates(1, 64, 2, 16)
    for prompt, last, spare in (
        (1, 0, set()), (64, 0, set()), (65, 64, set()), (600, 576, {512}), (2049, 2048, {512, 1024, 1536}),
        (2700, 2688, {1024, 2048}), (2048, 1984, {512, 1024, 1536}),
    ):  # fmt: skip
        state = states.begin(prompt, 0, True)
        assert (state.marks, state.spare) == ({0, last}, spare), prompt
        states.end(state)
    state = states.begin(600, 3, True)
    assert state.marks == {192, 576}
    planned = states.plan(state, 64, 500)
    assert [rows for rows, _ in planned] == [128, 448]
    states.release(planned)
    nobody = states.begin(600, 3, False)
    assert not states.plan(nobody, 64, 500)


def test_spare_snapshots_make_room_for_the_others_never_the_other_way() -> None:
    pool = StatePool(1, 3)

    def take(name: bytes, spare: bool = False) -> bool:
        number = pool.reserve(spare)
        return number is not None and pool.keep(name, number, spare)

    assert take(b"a") and take(b"s", True) and take(b"t", True)
    assert take(b"u", True) and b"t" not in pool  # of spare ones the newest, so that they lie apart
    assert take(b"b") and b"u" not in pool
    pool.find(b"s")  # no longer spare
    assert not take(b"v", True) and take(b"c") and b"a" not in pool and b"s" in pool


def test_the_banner_says_what_states_take() -> None:
    with engines() as make:
        assert make(5).banner == f"fake, states: {FakeDecoder.state_floats * 4e-6:.3g} MB a sequence, 5 kept"


def test_states_are_copied_not_shared() -> None:
    states = RecurrentStates(3, PAGE, 2, 2)
    states.memory.fill_(np.nan)
    first = states.begin(9, 0, True)
    states.memory[first.number] = 1.0
    ((rows, number),) = states.plan(first, 0, 9)
    states.memory[number] = 2.0
    states.keep(first, 0, [(rows, number)], [b"x", b"y"])
    second = states.begin(9, 2, True)
    states.restore(second, b"y")
    assert states.memory[second.number].tolist() == [2.0] * 3 and second.number not in (first.number, number)
