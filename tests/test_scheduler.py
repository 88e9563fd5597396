"""amq.runtime.scheduler on an engine that only counts: who gets rows, how texts end, and that no slot is ever lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from helpers.engines import FakeEngine, FakeSlot
from helpers.scheduling import TOKENIZER, Clock, Reader, letter, run
from helpers.tiny_models import byte_tokenizer

from amq.errors import AmqError
from amq.runtime.scheduler import LEAST_ROWS, PROMPT_SECONDS, Piece, Request, Scheduler, _Pace
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer


def engine_of(max_sequences: int = 4, max_rows: int = 32, context: int = 64, room: int = 1 << 20) -> FakeEngine:
    """room: positions of its KV cache."""

    def following(slot: FakeSlot) -> int:
        assert slot.length < slot.capacity  # the last new token is never computed
        return letter(slot.tokens)

    return FakeEngine(context, max_sequences, max_rows=max_rows, positions=room, following=following)


def lengths(engine: FakeEngine) -> list[list[int]]:
    """Tokens of each segment of each pass."""
    return [[len(tokens) for tokens, _ in segments] for segments in engine.passes]


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


SPECIAL_TOKENS = Tokenizer.from_transformers(byte_tokenizer("<bos> $A <eos>"), [257])


def ending_in(token: int) -> Callable[[FakeSlot], int]:
    """Text of three letters, then this token, and so on."""
    return lambda slot: token if (slot.length - len(slot.prompt)) % 4 == 3 else letter(slot.tokens)


def test_more_tokens_that_end_a_text() -> None:
    for options in ({"stop_token_ids": (5,)}, {"stop": ("<bos>",)}, {}):
        token = options.get("stop_token_ids", (256 if options else 257,))[0]
        engine = FakeEngine(vocab_size=300, following=ending_in(token))
        reader, other = Reader("hello", max_new_tokens=9, **options), Reader("hello", max_new_tokens=4, ignore_end=True)
        run(engine, reader, other, tokenizer=SPECIAL_TOKENS)
        assert (reader.finished, len(reader.text), reader.request.new_tokens) == ("stop", 3, 4)
        assert other.finished == "length" and other.text.startswith(reader.text)


def test_special_tokens_are_shown_to_who_asks() -> None:
    texts = []
    for options in ({"shown_special": (256,)}, {}):
        engine = FakeEngine(vocab_size=300, following=ending_in(256))
        run(engine, reader := Reader("hello", max_new_tokens=6, **options), tokenizer=SPECIAL_TOKENS)
        texts.append(reader.text)
    assert texts[0] == texts[1][:3] + "<bos>" + texts[1][3:]


def test_no_text_ends_before_its_least_length() -> None:
    ends = FakeEngine(vocab_size=300, following=lambda slot: 257)
    run(ends, reader := Reader("hello", max_new_tokens=9, min_tokens=4), tokenizer=SPECIAL_TOKENS)
    tokens = [choice.token for piece in reader.pieces for choice in piece.choices]
    assert tokens == [0, 0, 0, 0, 257]  # 0: the next best
    assert reader.finished == "stop"
    whole = Reader("hello", max_new_tokens=9).expected(9)
    readers = [Reader("hello", max_new_tokens=9, min_tokens=n, stop=(whole[:2], whole[6])) for n in (0, 2, 3)]
    run(engine_of(), *readers)
    assert [reader.text for reader in readers] == ["", whole[:6], whole[:6]]  # what was handed out is no stop text


def test_a_prompt_is_read_for_no_new_token() -> None:
    engine = engine_of(max_rows=8, context=16)
    run(engine, reader := Reader("h" * 16, max_new_tokens=0))
    assert reader.pieces == [Piece("", (), "length")] and reader.request.new_tokens == 0
    assert lengths(engine) == [[8], [8]] and not any(wanted for parts in engine.passes for _, wanted in parts)


def test_owners_and_biases_are_handed_on() -> None:
    run(engine := engine_of(), Reader("hello", max_new_tokens=1))
    assert engine.owners == ["its owner"]
    likely = TOKENIZER.encode("#")[0]
    run(engine_of(), reader := Reader("hello", max_new_tokens=3, logit_bias=((likely, 40),)))
    assert reader.text == "###"
    with pytest.raises(AmqError, match="logit_bias is for token 256, the model's vocabulary has 256"):
        Scheduler(engine_of(), TOKENIZER).submit(Reader("hello", logit_bias=((256, 1),)).request)


class RandomEngine(FakeEngine):
    """Logits that follow from all tokens before them."""

    def logits(self, slot: FakeSlot) -> torch.Tensor:
        return self.after(slot.tokens)

    def after(self, tokens: Sequence[int]) -> torch.Tensor:
        seed = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
        return torch.randn(self.vocab_size, generator=seed)


@pytest.mark.parametrize("new_tokens", [0, 2])
def test_prompts_are_scored(new_tokens: int) -> None:
    """Their log probabilities are the model's, whatever else runs, and what was cached is read again. The engine checks
    that a pass does not score too many."""
    engine = RandomEngine(context=512)
    engine.shared = 5
    prompt = [(7 * i) % 256 for i in range(150)]
    plain, alone = Reader("hello", max_new_tokens=4), Reader(prompt, max_new_tokens=2)
    scored = Reader(prompt, max_new_tokens=new_tokens, prompt_logprobs=3)
    second = Reader(prompt[:40], max_new_tokens=1, prompt_logprobs=0)
    run(engine, plain, scored, second, alone)
    assert scored.request.cached_tokens == 0 and plain.request.cached_tokens > 0
    rows = torch.stack([engine.after(prompt[:n]) for n in range(1, 150)]).double().log_softmax(-1)
    choices = scored.request.prompt_choices
    assert [choice.token for choice in choices] == prompt[1:]
    expected = rows[torch.arange(149), prompt[1:]].tolist()
    assert [choice.logprob for choice in choices] == pytest.approx(expected, abs=1e-5)
    top = rows.topk(3)
    assert [[t for t, _ in choice.top] for choice in choices] == top.indices.tolist()
    assert [choice.logprob for choice in second.request.prompt_choices] == pytest.approx(expected[:39], abs=1e-5)
    assert scored.text == alone.text[: len(scored.text)] and scored.request.new_tokens == new_tokens


@pytest.mark.parametrize("per_token, rows", [(1e-5, 128), (0.002, 50), (0.05, LEAST_ROWS)])
def test_prompts_are_read_at_the_machines_pace(per_token: float, rows: int) -> None:
    """Beside a text that goes on, a pass reads as much of a prompt as takes the time that a reader may wait."""
    engine = engine_of(max_rows=512, context=4096)
    clock = Clock(engine, 0.01, per_token)
    stream, long = Reader("hello", max_new_tokens=400), Reader("l" * 2000, max_new_tokens=1)
    scheduler = Scheduler(engine, TOKENIZER, clock=clock)
    scheduler.submit(stream.request)
    for _ in range(5):
        scheduler.step()
    scheduler.submit(long.request)
    while scheduler.step():
        pass
    read = [parts[1] for parts in lengths(engine) if len(parts) == 2]
    assert read[8:-1] == pytest.approx([rows] * (len(read) - 9), rel=0.2) and len(read) > 9
    assert rows == 128 or rows == LEAST_ROWS or rows * per_token == pytest.approx(PROMPT_SECONDS)
    assert stream.text == stream.expected(400) and long.text == long.expected(1)
    clock.per_token, before = 0.02, len(engine.passes)  # the machine is busy
    scheduler.submit(Reader("hello", max_new_tokens=400).request)
    scheduler.submit((again := Reader("m" * 2000, max_new_tokens=1)).request)
    while again.finished is None:
        scheduler.step()
    read = [parts[1] for parts in lengths(engine)[before:] if len(parts) == 2]
    assert set(read[8:-1]) == {LEAST_ROWS}


def test_one_odd_pass_does_not_make_the_next_a_long_one() -> None:
    pace = _Pace(128)
    pace.passed(1.0, 10, decoding=False)
    assert pace.rows == LEAST_ROWS
    pace.passed(0.5, 0, decoding=True)  # nobody's prompt, and something else had the processors
    pace.passed(0.4, LEAST_ROWS, decoding=True)
    assert pace.rows == LEAST_ROWS  # not more for a pass that was faster than one without prompts
    for _ in range(30):
        before = pace.rows
        pace.passed(1e-4, before, decoding=True)
        assert pace.rows <= 2 * before
    assert pace.rows == 128


class PanicException(BaseException):  # noqa: N818 (the name that a panic of Rust has)
    pass


class Panics:
    """A constraint that gives up at its third token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.left = error, 3

    def allowed(self) -> np.ndarray:
        self.left -= 1
        if not self.left:
            raise self.error
        return np.full(8, -1, np.int32)

    def accept(self, token: int) -> None:
        pass


def test_a_panic_ends_one_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from amq.runtime.text_stream import TextStream

    push = TextStream.push

    def panics(stream: TextStream, token: int) -> str:
        if stream.stop == ("panic",):
            raise PanicException("index out of bounds")
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", panics)
    good, in_text = Reader("g", max_new_tokens=5), Reader("hello", stop=("panic",))
    in_constraint = Reader("hello", Panics(PanicException("index out of bounds")))
    own = Reader("hello", Panics(AmqError("the text left its grammar")))
    run(engine_of(), good, in_text, in_constraint, own)
    assert good.text == good.expected(5) and good.finished == "length"
    message = "the engine failed (PanicException: index out of bounds)"
    assert in_text.request.error == in_constraint.request.error == message
    assert own.request.error == "the text left its grammar" and own.request.new_tokens == 2
    engine = engine_of()
    engine.failing = PanicException("in the engine")
    run(engine, reader := Reader("hello"))
    assert reader.finished == "error" and "in the engine" in reader.request.error
    for error in (KeyboardInterrupt(), SystemExit(3)):
        engine.failing = error
        scheduler = Scheduler(engine, TOKENIZER)
        scheduler.submit(Reader("hello").request)
        with pytest.raises(type(error)):
            scheduler.step()


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
