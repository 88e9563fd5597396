"""amq.runtime.scheduler on an engine that only counts: who gets rows, how texts end, and that no slot is ever lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.engines import FakeEngine, FakeSlot
from helpers.tiny_models import byte_tokenizer

from amq.errors import AmqError
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_transformers(byte_tokenizer(), [])
LETTERS = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")


def letter(tokens: Sequence[int]) -> int:
    """Follows from all tokens before it; text of one byte per token."""
    return LETTERS[(sum(tokens) * 31 + len(tokens)) % 26]


def engine_of(max_sequences: int = 4, max_rows: int = 32, context: int = 64, room: int = 1 << 20) -> FakeEngine:
    """room: positions of its KV cache."""

    def following(slot: FakeSlot) -> int:
        assert slot.length < slot.capacity  # the last new token is never computed
        return letter(slot.tokens)

    return FakeEngine(context, max_sequences, max_rows=max_rows, positions=room, following=following)


def lengths(engine: FakeEngine) -> list[list[int]]:
    """Tokens of each segment of each pass."""
    return [[len(tokens) for tokens, _ in segments] for segments in engine.passes]


class Reader:
    """A request's listener: collects."""

    def __init__(self, prompt: Sequence[int] | str, **sampling: Any) -> None:
        self.pieces: list[Piece] = []
        tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        self.request = Request(tokens, Sampling(**sampling), self.pieces.append)

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)

    @property
    def finished(self) -> str | None:
        return self.pieces[-1].finished if self.pieces else None

    def expected(self, new_tokens: int) -> str:
        tokens = list(self.request.prompt)
        for _ in range(new_tokens):
            tokens.append(letter(tokens))
        return TOKENIZER.decode(tokens[len(self.request.prompt) :])


def run(engine: FakeEngine, *readers: Reader, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Scheduler:
    scheduler = Scheduler(engine, tokenizer, **options)
    for reader in readers:
        scheduler.submit(reader.request)
    while scheduler.step():
        assert engine.passes is not None and len(engine.passes) < 2000
    assert not engine.slots and not scheduler.running and not scheduler.waiting
    return scheduler


def test_one_text() -> None:
    reader = Reader("hello", max_new_tokens=7)
    run(engine := engine_of(), reader)
    assert reader.text == reader.expected(7) and reader.finished == "length"
    assert lengths(engine) == [[5]] + [[1]] * 6
    assert reader.request.new_tokens == len([c for p in reader.pieces for c in p.choices]) == 7


def test_several_share_passes_and_texts_do_not_mix() -> None:
    readers = [Reader("x" * (i + 1), max_new_tokens=3 + i) for i in range(7)]
    run(engine := engine_of(max_sequences=3), *readers)
    for i, reader in enumerate(readers):
        assert reader.text == reader.expected(3 + i) and reader.finished == "length"
    assert max(map(len, engine.passes)) == 3


def test_prompts_come_in_parts() -> None:
    long, short = Reader("l" * 60, max_new_tokens=2), Reader("s" * 10, max_new_tokens=10)
    run(engine := engine_of(max_rows=32), long, short, prefill_rows=8)
    # nobody decodes: all rows, at least a quarter for the first; then 8 rows beside the one that decodes
    assert lengths(engine)[:4] == [[22, 10], [1, 8], [1, 8], [1, 8]]
    assert long.text == long.expected(2) and short.text == short.expected(10)
    readers = [Reader("a" * 20, max_new_tokens=9), *(Reader("b" * n, max_new_tokens=2) for n in (30, 40, 9))]
    run(engine := engine_of(max_rows=64), *readers)
    assert lengths(engine)[0] == [20, 30, 5, 9]  # the rest by length: 9, 20, 30, and what is left


def test_the_oldest_prompt_never_starves() -> None:
    engine = engine_of(max_rows=32, max_sequences=4)
    scheduler, readers = Scheduler(engine, TOKENIZER, prefill_rows=8), []
    long = Reader("l" * 60, max_new_tokens=1)
    scheduler.submit(long.request)
    for _ in range(40):  # a new short one in every pass
        readers.append(Reader("s" * 8, max_new_tokens=2))
        scheduler.submit(readers[-1].request)
        scheduler.step()
    assert long.finished == "length"


def test_who_does_not_fit_waits_in_order() -> None:
    readers = [Reader("a" * 10, max_new_tokens=10), Reader("b" * 20, max_new_tokens=10), Reader("c", max_new_tokens=1)]
    engine = engine_of(room=45)
    scheduler = Scheduler(engine, TOKENIZER)
    for reader in readers:
        scheduler.submit(reader.request)
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (1, 2)  # the third would fit, but came later
    while scheduler.step():
        pass
    assert [r.finished for r in readers] == ["length"] * 3 and not engine.slots
    never = Reader("d" * 30, max_new_tokens=30)
    run(engine, never)
    assert never.finished == "error" and "never fit" in never.request.error


def test_an_engine_that_others_fill_is_an_error_not_a_hang() -> None:
    engine, reader = engine_of(room=50), Reader("hello", max_new_tokens=5)
    engine.slots.add(FakeSlot([1], 44, 0))
    scheduler = Scheduler(engine, TOKENIZER)
    scheduler.submit(reader.request)
    assert scheduler.step() and not scheduler.step()
    assert reader.finished == "error" and "no room" in reader.request.error


def test_ends() -> None:
    whole = Reader("hello", max_new_tokens=9).expected(9)
    end = TOKENIZER.encode(whole[4])[0]
    ending = Tokenizer.from_transformers(byte_tokenizer(), [end])
    at = whole.index(whole[4])
    reader, ignoring = Reader("hello", max_new_tokens=9), Reader("hello", max_new_tokens=9, ignore_end=True)
    run(engine_of(), reader, ignoring, tokenizer=ending)
    assert reader.text == whole[:at] and reader.finished == "stop" and reader.request.new_tokens == at + 1
    assert ignoring.text == whole and ignoring.finished == "length"
    stopping = Reader("hello", max_new_tokens=9, stop=(whole[3:6],))
    held = Reader("hello", max_new_tokens=5, stop=(whole[3:5] + "!",))
    run(engine_of(), stopping, held)
    assert stopping.text == whole[:3] and stopping.finished == "stop" and stopping.request.new_tokens == 6
    assert held.text == whole[:5] and held.finished == "length"
    full = Reader("x" * 60, max_new_tokens=50)
    run(engine_of(context=64), full)
    assert full.request.new_tokens == 4 and full.finished == "length"


def test_cached_tokens_are_not_read_again() -> None:
    engine, reader = engine_of(), Reader("hello world", max_new_tokens=2)
    engine.shared = 8
    run(engine, reader)
    assert lengths(engine) == [[3], [1]] and reader.request.cached_tokens == 8 and reader.text == reader.expected(2)


def test_what_can_never_run_is_refused_at_once() -> None:
    scheduler = Scheduler(engine_of(context=16), TOKENIZER)
    for prompt, message in (
        ([], "the prompt is empty"),
        ([1] * 16, "the prompt has 16 tokens, the model's context 16"),
        ([256], "outside the model's vocabulary of 256"),
        ([-1], "outside the model's vocabulary"),
    ):
        with pytest.raises(AmqError, match=message):
            scheduler.submit(Reader(prompt).request)
    assert not scheduler.step()
    with pytest.raises(AmqError, match="prefill_rows must be at least 1"):
        Scheduler(engine_of(), TOKENIZER, prefill_rows=0)
    with pytest.raises(AmqError, match="expected 1 to 2 sequences at once, got 3"):
        Scheduler(engine_of(max_sequences=3, max_rows=2), TOKENIZER)


def test_cancelling() -> None:
    engine = engine_of(max_sequences=1)
    scheduler = Scheduler(engine, TOKENIZER)
    running, waiting, other = Reader("a"), Reader("b"), Reader("c", max_new_tokens=2)
    for reader in (running, waiting, other):
        scheduler.submit(reader.request)
    scheduler.step()
    for reader in (waiting, running, running, waiting):
        scheduler.cancel(reader.request)
    assert not engine.slots
    while scheduler.step():
        pass
    scheduler.cancel(other.request)
    assert [[p.finished for p in r.pieces] for r in (running, waiting, other)] == [
        [None, "cancelled"], ["cancelled"], [None, "length"]
    ]  # fmt: skip


def test_failures_of_the_engine_end_one_pass_only(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, TOKENIZER)
    first, second = Reader("secret text"), Reader("b")
    scheduler.submit(first.request)
    scheduler.submit(second.request)
    scheduler.step()
    engine.failing = RuntimeError("broken")
    scheduler.step()
    assert first.finished == second.finished == "error" and not engine.slots
    assert first.request.error == "the engine failed (RuntimeError: broken)" and "secret" not in caplog.text
    engine.failing = None
    later = Reader("c", max_new_tokens=2)
    scheduler.submit(later.request)
    while scheduler.step():
        pass
    assert later.text == later.expected(2)


def test_logits_that_are_no_numbers_end_their_request_only() -> None:
    engine, bad, good = engine_of(), Reader("a", max_new_tokens=3), Reader("b", max_new_tokens=3)
    scheduler = Scheduler(engine, TOKENIZER)
    scheduler.submit(bad.request)
    scheduler.submit(good.request)
    engine.nan = True
    scheduler.step()
    engine.nan = False
    while scheduler.step():
        pass
    assert bad.finished == "error" and "nan as a logit" in bad.request.error
    assert good.text == good.expected(3) and not engine.slots


def test_a_listener_that_fails_or_cancels_others() -> None:
    engine = engine_of()
    scheduler = Scheduler(engine, TOKENIZER)
    victim, good = Reader("v"), Reader("g", max_new_tokens=4)
    calls: list[Piece] = []

    def fails(piece: Piece) -> None:
        calls.append(piece)
        scheduler.cancel(victim.request)
        raise RuntimeError("the reader is gone")

    for request in (Request([1], Sampling(), fails), victim.request, good.request):
        scheduler.submit(request)
    while scheduler.step():
        pass
    assert len(calls) == 1 and [p.finished for p in victim.pieces] == ["cancelled"]
    assert good.text == good.expected(4) and not engine.slots


@pytest.mark.parametrize("seed", range(30))
def test_every_request_finishes_once_and_every_slot_is_closed(seed: int) -> None:
    draw = random.Random(seed)
    engine = engine_of(draw.randint(1, 4), draw.randint(4, 20), context=40, room=draw.choice([50, 90, 1000]))
    scheduler = Scheduler(engine, TOKENIZER, prefill_rows=draw.randint(1, 12))
    readers: list[Reader] = []
    for _ in range(150):
        action = draw.random()
        if action < 0.2:
            sampling = {"max_new_tokens": draw.randint(1, 30), "stop": draw.choice([(), ("a",), ("bc", "q")])}
            readers.append(Reader([draw.randrange(256) for _ in range(draw.randint(1, 39))], **sampling))
            scheduler.submit(readers[-1].request)
        elif action < 0.3 and readers:
            scheduler.cancel(draw.choice(readers).request)
        else:
            engine.shared, engine.nan = draw.choice([0, 0, 5]), draw.random() < 0.03
            engine.failing = RuntimeError("broken") if draw.random() < 0.03 else None
            scheduler.step()
        assert len(engine.slots) == scheduler.running <= engine.max_sequences
    engine.failing, engine.nan = None, False
    while scheduler.step():
        pass
    assert not engine.slots and not scheduler.running and not scheduler.waiting
    for reader in readers:
        assert [p.finished is not None for p in reader.pieces].count(True) == 1 and reader.finished
        assert reader.expected(reader.request.new_tokens).startswith(reader.text)
        assert (reader.finished == "error") == bool(reader.request.error)
