"""amq.runtime.scheduler on an engine that chooses tokens itself and returns them one pass late.

Texts are those of an engine that does not and end at the same places; no slot is fed beyond its room, and none is kept,
which the fake engine checks."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.engines import FakeEngine, FakeSamplingEngine, FakeSlot
from helpers.scheduling import TOKENIZER, Clock, Reader, letter, run
from helpers.tiny_models import byte_tokenizer

from amq.runtime.engine import SamplingEngine
from amq.runtime.scheduler import Piece, Scheduler, _Pace
from amq.runtime.tokenizer import Tokenizer


class EveryToken:
    """A constraint that allows all."""

    def allowed(self) -> np.ndarray:
        return np.full(8, -1, np.int32)

    def accept(self, token: int) -> None:
        pass


def engine_of(kind: type[FakeEngine] = FakeSamplingEngine, **options: Any) -> Any:
    def following(slot: FakeSlot) -> int:
        assert slot.length < slot.capacity
        return letter(slot.tokens)

    return kind(**{"context": 64, "max_rows": 32, "following": following, **options})


def test_which_engines_choose_tokens() -> None:
    assert isinstance(engine_of(), SamplingEngine) and not isinstance(engine_of(FakeEngine), SamplingEngine)


def test_one_text() -> None:
    """Its first token comes from the pass that reads the prompt; each later one was fed back where it was chosen."""
    run(engine := engine_of(), reader := Reader("hello", max_new_tokens=7))
    assert reader.text == reader.expected(7) and reader.finished == "length" and reader.request.new_tokens == 7
    assert [[len(tokens) for tokens, _ in parts] for parts in engine.passes] == [[5]]
    assert engine.steps == [1] * 6 + [0]  # the last call only fetches
    for new_tokens in (0, 1):
        run(engine := engine_of(), reader := Reader("hello", max_new_tokens=new_tokens))
        assert reader.text == reader.expected(new_tokens) and not engine.steps


ENDING = Tokenizer.from_transformers(byte_tokenizer(), TOKENIZER.encode("c"))


@pytest.mark.parametrize("options", [
    {}, {"ignore_end": True}, {"stop": ("a",)}, {"stop": ("qz", "ab", "e")}, {"stop_token_ids": (*b"pqr",)},
    {"temperature": 0.7, "seed": 3, "stop": ("k",)}, {"shown_special": (5,)}, {"max_new_tokens": 1},
])  # fmt: skip
def test_texts_end_where_they_do_on_other_engines(options: dict[str, Any]) -> None:
    """Ends come one pass late, and what was chosen after them is never told."""
    readers = []
    for kind in (FakeEngine, FakeSamplingEngine):
        some = [
            Reader(prompt, **{"max_new_tokens": 20, **options}) for prompt in ("hello", "x", "a longer prompt", "y")
        ]
        run(engine := engine_of(kind), *some, tokenizer=ENDING)
        readers.append(some)
    for other, own in zip(*readers, strict=True):
        assert (own.text, own.finished, own.request.new_tokens) == (
            other.text,
            other.finished,
            other.request.new_tokens,
        )
        assert [p.choices for p in own.pieces] == [p.choices for p in other.pieces]
    assert (max(engine.steps, default=0) > 2) == ("max_new_tokens" not in options)


def test_who_needs_logits_shares_the_engine() -> None:
    """Grammars, penalties, biases, log probabilities and least lengths go through `forward`, beside other texts."""
    readers = [
        Reader("a", max_new_tokens=9),
        Reader("b", EveryToken(), max_new_tokens=9),
        *(Reader("c" * n, max_new_tokens=9, **options) for n, options in enumerate([
            {"logprobs": 0}, {"repetition_penalty": 1.01}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
            {"logit_bias": ((7, -1.0),)}, {"min_tokens": 2},
        ], 1)),
        Reader("d", max_new_tokens=9, prompt_logprobs=1),
    ]  # fmt: skip
    run(engine := engine_of(max_sequences=9), *readers)
    for reader in readers:
        assert reader.text == reader.expected(9) and reader.finished == "length"
    assert engine.steps == [2] * 8 + [0]
    assert [len(parts) for parts in engine.passes] == [9] + [7] * 8


def test_who_joins_and_who_leaves() -> None:
    """A prompt is read between the passes of others, whose texts go on; one that leaves ends nothing but itself."""
    engine = engine_of()
    scheduler = Scheduler(engine, TOKENIZER)
    first, second, cancelled = Reader("a", max_new_tokens=30), Reader("b" * 40, max_new_tokens=20), Reader("c")
    scheduler.submit(first.request)
    for _ in range(5):
        scheduler.step()
    assert first.request.new_tokens == 4  # the fifth is on its way
    scheduler.submit(second.request)
    scheduler.submit(cancelled.request)
    while cancelled.request.new_tokens < 3:
        scheduler.step()
    scheduler.cancel(cancelled.request)
    assert len(engine.slots) == scheduler.running == 2
    while scheduler.step():
        pass
    assert first.text == first.expected(30) and second.text == second.expected(20) and not engine.alone
    assert cancelled.finished == "cancelled" and cancelled.text == cancelled.expected(3)
    assert {1, 2, 3} <= set(engine.steps)


def test_a_listener_that_fails_or_cancels_others() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, TOKENIZER)
    fails, victim, good = (Reader(prompt, max_new_tokens=9) for prompt in "fvg")

    def listener(piece: Piece) -> None:
        fails.pieces.append(piece)
        if fails.request.new_tokens == 4:
            scheduler.cancel(victim.request)
            raise RuntimeError("the reader is gone")

    fails.request.listener = listener
    for reader in (fails, victim, good):
        scheduler.submit(reader.request)
    while scheduler.step():
        pass
    assert len(fails.pieces) == 4 and (victim.finished, victim.request.new_tokens) == ("cancelled", 3)
    assert good.text == good.expected(9) and not engine.slots and not engine.alone


def test_logits_that_are_no_numbers_end_their_request_only() -> None:
    engine, bad, good = engine_of(), Reader("a", max_new_tokens=9), Reader("b", max_new_tokens=9)
    scheduler = Scheduler(engine, TOKENIZER)
    for reader in (bad, good):
        scheduler.submit(reader.request)
    for step in range(20):
        engine.numberless = step == 3
        scheduler.step()
    assert bad.finished == "error" and bad.request.new_tokens == 3 and bad.request.own_error
    assert "gave nan or an infinity as a logit" in bad.request.error
    assert good.text == good.expected(9) and not engine.slots and scheduler.failed_passes == 0


def tell_and_cancel(scheduler: Scheduler, reader: Reader, other: Reader, piece: Piece) -> None:
    reader.pieces.append(piece)
    if piece.finished == "error":
        scheduler.cancel(other.request)


def test_failures_of_the_engine_end_all_that_run_on_it() -> None:
    """They are counted once per step, whichever of its two passes fail."""
    engine = engine_of()
    scheduler = Scheduler(engine, TOKENIZER)
    alone, other = Reader("a"), Reader("b", logprobs=0)
    scheduler.submit(alone.request)
    scheduler.submit(other.request)
    for _ in range(3):
        scheduler.step()
    assert list(engine.steps) == [1, 1] and scheduler.failed_passes == 0
    engine.failing = RuntimeError("broken")
    scheduler.step()
    assert alone.finished == other.finished == "error" and scheduler.failed_passes == 1
    assert alone.request.error == other.request.error == "the engine failed (RuntimeError: broken)"
    assert not engine.slots and not engine.alone
    scheduler.submit(Reader("c").request)
    scheduler.step()
    assert scheduler.failed_passes == 2
    engine.failing = None
    pair = Reader("d"), Reader("e")
    for reader, other in (pair, pair[::-1]):
        reader.request.listener = partial(tell_and_cancel, scheduler, reader, other)
        scheduler.submit(reader.request)
    scheduler.step()
    engine.failing = RuntimeError("broken")
    scheduler.step()
    assert [[p.finished for p in reader.pieces] for reader in pair] == [[None, "error"], [None, "cancelled"]]
    engine.failing = None
    run(engine, later := Reader("c", max_new_tokens=5))
    assert later.text == later.expected(5)


def test_seeds() -> None:
    """A request's own, of 64 bits whatever its sign; another one every time where none is given."""
    for _ in range(2):
        engine = engine_of()
        run(engine, *(Reader("a", temperature=1.0, seed=seed, max_new_tokens=3) for seed in (7, -1, 2**63 - 1)))
        assert engine.seeds == [7, 2**64 - 1, 2**63 - 1]
    run(engine := engine_of(), *(Reader("a", temperature=1.0, max_new_tokens=3) for _ in range(4)))
    assert len(set(engine.seeds)) == 4


def test_prompts_are_read_at_the_pace_of_passes_with_their_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """While texts decode on their own, prompts are cut as beside others; the first step, in which no pass is waited
    for, tells nothing of how long one takes."""
    engine = engine_of(context=4096, max_rows=512)
    clock = Clock(engine, 0.0, 0.002)
    step = engine.step

    def timed() -> dict[FakeSlot, int]:
        tokens = step()
        clock.now += 0.01 * bool(tokens)
        return tokens

    engine.step = timed
    scheduler, seconds = Scheduler(engine, TOKENIZER, clock=clock), []
    passed = _Pace.passed

    def noted(pace: _Pace, took: float, rows: int, decoding: bool) -> None:
        seconds.extend([] if rows else [took])
        passed(pace, took, rows, decoding)

    monkeypatch.setattr(_Pace, "passed", noted)
    stream, long = Reader("hello", max_new_tokens=400), Reader("l" * 2000, max_new_tokens=1)
    scheduler.submit(stream.request)
    for _ in range(8):
        scheduler.step()
    scheduler.submit(long.request)
    while scheduler.step():
        pass
    assert seconds == pytest.approx([0.01] * len(seconds)) and len(seconds) > 300
    read = [len(parts[0][0]) for parts in engine.passes[1:]]
    assert max(read) <= 128 and read[8:-1] == pytest.approx([50] * (len(read) - 9), rel=0.2) and len(read) > 9
    assert stream.text == stream.expected(400) and long.text == long.expected(1)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_finishes_once_and_every_slot_is_closed(seed: int) -> None:
    draw = random.Random(seed)
    room = draw.choice([50, 90, 1000])
    engine = engine_of(max_sequences=draw.randint(1, 4), max_rows=draw.randint(4, 20), context=40, positions=room)
    scheduler = Scheduler(engine, TOKENIZER, prefill_rows=draw.randint(1, 12))
    readers: list[Reader] = []
    for _ in range(150):
        action = draw.random()
        if action < 0.2:
            sampling = {"max_new_tokens": draw.randint(1, 30), "stop": draw.choice([(), ("a",), ("bc", "q")])}
            sampling["logprobs"] = draw.choice([None, None, 0])
            readers.append(Reader([draw.randrange(256) for _ in range(draw.randint(1, 39))], **sampling))
            scheduler.submit(readers[-1].request)
        elif action < 0.3 and readers:
            scheduler.cancel(draw.choice(readers).request)
        else:
            engine.shared, engine.nan = draw.choice([0, 0, 5]), draw.random() < 0.03
            engine.numberless = draw.random() < 0.03
            engine.failing = RuntimeError("broken") if draw.random() < 0.03 else None
            scheduler.step()
        assert len(engine.slots) == scheduler.running <= engine.max_sequences
    engine.failing, engine.nan, engine.numberless = None, False, False
    while scheduler.step():
        pass
    assert not engine.slots and not engine.alone and not scheduler.running and not scheduler.waiting
    for reader in readers:
        assert [p.finished is not None for p in reader.pieces].count(True) == 1 and reader.finished
        assert reader.expected(reader.request.new_tokens).startswith(reader.text)
        assert (reader.finished == "error") == bool(reader.request.error)
