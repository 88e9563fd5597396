"""Continuous batching: requests in, tokens and text out, as many at once as the engine holds.

Every `step` is one pass of the engine: one token of each sequence that is decoding, and as much of the waiting prompts
as fits. While anyone decodes, a pass reads only as many tokens of prompts as take `PROMPT_SECONDS`, by what the latest
passes took, so that a long prompt does not hold up the others' next token; prompts that wait share them, the shortest
rest first, but for a quarter that goes to the one that came first, so that none waits forever. What the parts are
changes no text.

Where the engine can choose tokens itself (`SamplingEngine`), a text decodes on its own from its second token on, if its
settings allow that: such texts have passes without a look at logits, of which one runs while the tokens of the one
before are read here. Prompts, and texts that need such a look (a grammar, penalties, log probabilities), go through
`forward` in between.

Not thread-safe: one thread submits, steps and cancels (amq.serve has a thread for it).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from amq.errors import AmqError
from amq.runtime.engine import MAX_SCORED, Engine, SamplingEngine, Segment, Slot
from amq.runtime.sampling import Choice, Constraint, Sampler, no_token, score
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import PANIC, TextStream, Tokenizer

OLDEST_SHARE = 4
"""The prompt that came first gets at least this part (a quarter) of the tokens of prompts that a pass reads."""
PROMPT_SECONDS = 0.1
"""That a pass may read prompts for while anyone decodes."""
LEAST_ROWS = 8
"""Tokens of prompts that a pass reads however slow the machine: a few more beside those that decode cost little."""

log = logging.getLogger(__name__)


@dataclass
class Piece:
    """What a step added to a request's text.

    text: may be "" while a character or a possible stop text is incomplete.
    choices: the tokens of this step; an end token is among them, and has no text.
    finished: None, or `stop` (end token or stop text), `length` (max_new_tokens or the context), `cancelled`, `error`.
    """

    text: str
    choices: tuple[Choice, ...] = ()
    finished: str | None = None


@dataclass(eq=False)
class Request:
    """One text to be made; submitted once.

    prompt: token ids. listener: called with every Piece, from the thread that steps; it must not block. One that raises
        gets no more, and its request ends.
    owner: whose text it is: prefix caching shares nothing between owners. constraint: which tokens may come next.
    new_tokens: chosen so far, an end token included.
    prompt_choices: with `Sampling.prompt_logprobs`, of the prompt's tokens but the first; there with the first Piece.
    """

    prompt: Sequence[int]
    sampling: Sampling
    listener: Callable[[Piece], None]
    owner: str = ""
    constraint: Constraint | None = None
    prompt_choices: list[Choice] = field(default_factory=list, init=False)
    new_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)  # of the prompt, that were computed for an earlier request
    error: str = field(default="", init=False)  # why `finished` is `error`
    own_error: bool = field(default=False, init=False)  # of its text alone, such as of its constraint


class _Active:
    """A request that holds a slot.

    todo: its tokens that are not computed yet; reading: those are of the prompt. on_its_own: the engine chooses its
    tokens and knows what to compute.
    """

    def __init__(self, request: Request, slot: Slot, tokenizer: Tokenizer, limit: int) -> None:
        self.request, self.slot, self.limit = request, slot, limit
        how = request.sampling
        self.ends = _ends(request, tokenizer)
        self.sampler = Sampler(how, request.prompt, self.ends, request.constraint)
        self.stream = TextStream(tokenizer, how.stop, frozenset(how.shown_special))
        self.todo: Sequence[int] = request.prompt[slot.length :]
        self.reading, self.on_its_own = True, False

    def catch_up(self) -> bool:
        """Leaves out what was computed elsewhere since; returns whether more of that is on its way."""
        before = self.slot.length
        more = self.slot.catch_up()
        found = self.slot.length - before
        self.todo = self.todo[found:]
        self.request.cached_tokens += found
        return more

    @property
    def scored(self) -> bool:
        """Whether it is a prompt whose tokens' log probabilities are wanted."""
        return self.reading and self.request.sampling.prompt_logprobs is not None

    def segment(self, tokens: Sequence[int]) -> Segment:
        last = len(tokens) == len(self.todo) and self.limit > 0
        return Segment(self.slot, tokens, last, every=self.scored)

    def score(self, logits: Tensor) -> None:
        """The prompt's tokens after those that were computed last, each with its row of `logits`."""
        request, count = self.request, self.request.sampling.prompt_logprobs
        assert count is not None
        following = request.prompt[len(request.prompt) - len(self.todo) - len(logits) + 1 :]
        request.prompt_choices += [score(token, row, count) for token, row in zip(following, logits, strict=False)]

    def advance(self, logits: Tensor) -> Piece:
        """The next token, all before it being computed.

        logits: [vocabulary]. The request has ended where the piece has.
        """
        return self.take(self.sampler.choose(logits))

    def take_chosen(self, token: int) -> Piece:
        """The next token, which the engine chose. Raises AmqError where it is −1: there was nothing to choose from."""
        if token < 0:
            raise no_token("nan or an infinity")
        return self.take(Choice(token))

    def take(self, choice: Choice) -> Piece:
        """The next token is this one."""
        request, how = self.request, self.request.sampling
        request.new_tokens += 1
        self.todo, self.reading = (choice.token,), False
        ended = choice.token in self.ends
        self.stream.stop = how.stop if request.new_tokens >= how.min_tokens else ()
        text = "" if ended else self.stream.push(choice.token)
        finished = None
        if ended or self.stream.stopped:
            finished = "stop"
        elif request.new_tokens >= self.limit:
            finished = "length"
        if finished is not None:
            text += self.stream.finish()  # the rest may hold a stop text yet: half a character before it was pending
            finished = "stop" if self.stream.stopped else finished
        return Piece(text, (choice,), finished)


def _ends(request: Request, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a request's text. A constraint has an end of its own, which the model's end tokens tell."""
    how = request.sampling
    own = tokenizer.end_ids if not how.ignore_end or request.constraint is not None else frozenset()
    named = (tokenizer.special_named(text) for text in how.stop)
    return own | frozenset(how.stop_token_ids) | {token for token in named if token is not None}


class _Pace:
    """How many tokens of prompts a pass reads while anyone decodes (`rows`), by what passes took.

    What a pass takes beside one without prompts is known badly on a busy machine. So `rows` grows to twice itself at
    most, and prompts are taken to be a quarter of a pass at least.
    """

    def __init__(self, most: int) -> None:
        self._most, self._least = most, min(LEAST_ROWS, most)
        self.rows = most
        self._seconds, self._read = 0.0, 0.0  # of late, for prompts alone; the latest pass counts as all before it
        self._decoding = 0.0  # seconds of a pass without prompts

    def passed(self, seconds: float, rows: int, decoding: bool) -> None:
        """A pass took `seconds` with `rows` tokens of prompts, beside others that decode or not."""
        if not rows:
            self._decoding += (seconds - self._decoding) / 2
            return
        own = max(seconds - self._decoding, seconds / 4) if decoding else seconds
        self._seconds = self._seconds / 2 + max(own, 1e-9)
        self._read = self._read / 2 + rows
        fitting = max(int(PROMPT_SECONDS * self._read / self._seconds), self._least)
        self.rows = min(fitting, 2 * self.rows, self._most)


class Scheduler:
    """Runs requests on an engine, first come, first admitted.

    prefill_rows: tokens of prompts that a pass reads at most while anyone decodes. clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prefill_rows: int = 128,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 1 <= engine.max_sequences <= engine.max_rows:
            raise AmqError(f"expected 1 to {engine.max_rows} sequences at once, got {engine.max_sequences}")
        if prefill_rows < 1:
            raise AmqError(f"prefill_rows must be at least 1, got {prefill_rows}")
        self._engine, self._tokenizer, self._clock = engine, tokenizer, clock
        self._sampling = engine if isinstance(engine, SamplingEngine) else None
        self._pace = _Pace(prefill_rows)
        self.failed_passes = 0  # of the engine, since the latest that did not fail
        self._waiting: deque[Request] = deque()
        self._running: dict[Request, _Active] = {}  # in the order in which they came

    def submit(self, request: Request) -> None:
        """Queues it. Raises AmqError at once where it can never run (empty prompt, prompt as long as the context)."""
        length, context, vocabulary = len(request.prompt), self._engine.context, self._engine.vocab_size
        if not length:
            raise AmqError("the prompt is empty: give some text")
        if length + min(request.sampling.max_new_tokens, 1) > context:
            raise AmqError(f"the prompt has {length} tokens, the model's context {context}: give a shorter one")
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            raise AmqError(
                f"the prompt has a token id outside the model's vocabulary of {vocabulary}: the tokenizer is not this "
                "model's"
            )
        for token, _ in request.sampling.logit_bias:
            if token >= vocabulary:
                raise AmqError(f"logit_bias is for token {token}, the model's vocabulary has {vocabulary}")
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends it, waiting or running, with a Piece `cancelled`; nothing happens if it has finished."""
        if request in self._running:
            self._end(request, Piece("", finished="cancelled"))
        elif request in self._waiting:
            self._waiting.remove(request)
            self._tell(request, Piece("", finished="cancelled"))

    def step(self) -> bool:
        """One pass, if there is anything to do; returns whether there was."""
        worked = self._admit()
        if not self._running:
            return worked
        start = self._clock()
        decoding = any(not active.reading for active in self._running.values())
        alone = self._step_alone()
        parts = self._parts()
        read = sum(len(tokens) for active, tokens in parts if active.reading)
        passes = [alone, self._forward(parts) if parts else None]  # nothing runs while all wait for pages from disk
        if False in passes:
            self.failed_passes += 1
        elif True in passes:
            self.failed_passes = 0
            self._pace.passed(self._clock() - start, read, decoding)
        return True

    def _forward(self, parts: list[tuple[_Active, Sequence[int]]]) -> bool:
        """A pass of those whose tokens come from here; returns whether it did not fail."""
        segments = [active.segment(tokens) for active, tokens in parts]
        try:
            logits = self._engine.forward(segments)
        except BaseException as error:  # noqa: BLE001 (whatever it is, what the slots hold is no longer known)
            self._fail_all((active for active, _ in parts), _reason(error))
            return False
        rows = logits.split_with_sizes([len(s.tokens) if s.every else int(s.logits) for s in segments])
        for active, tokens in parts:
            active.todo = active.todo[len(tokens) :]
        for (active, _), own in zip(parts, rows, strict=True):
            if active.request in self._running:  # a listener may have cancelled it since
                self._advance(active, own)
        return True

    def _step_alone(self) -> bool | None:
        """Starts a pass of those that decode on their own, and tells what the one before chose; returns whether that
        did not fail, None where there was none."""
        alone = {active.slot: active for active in self._running.values() if active.on_its_own}
        if self._sampling is None or not alone:
            return None
        try:
            tokens = self._sampling.step()
        except BaseException as error:  # noqa: BLE001 (as in `_forward`)
            self._fail_all(alone.values(), _reason(error))
            return False
        for slot, token in tokens.items():
            if alone[slot].request in self._running:  # a listener may have cancelled it since
                self._give(alone[slot].request, partial(alone[slot].take_chosen, token))
        return True if tokens else None

    @property
    def waiting(self) -> int:
        """Requests that hold no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    def _admit(self) -> bool:
        """Gives slots to those who wait, in their order; returns whether one of them ended instead."""
        ended = False
        while self._waiting and len(self._running) < self._engine.max_sequences:
            request = self._waiting[0]
            limit = min(request.sampling.max_new_tokens, self._engine.context - len(request.prompt))
            try:
                reuse = request.sampling.prompt_logprobs is None
                slot = self._engine.open(request.prompt, limit, request.owner, reuse)
                if slot is None and not self._running:
                    raise AmqError("the engine has no room: something else runs on it")
            except BaseException as error:  # noqa: BLE001 (it waits first in line: nobody would come after it)
                reason = _reason(error)
                self._waiting.popleft()
                self._fail(request, reason)
                ended = True
                continue
            if slot is None:
                break
            self._waiting.popleft()
            request.cached_tokens = slot.length
            try:
                self._running[request] = _Active(request, slot, self._tokenizer, limit)
            except BaseException as error:  # noqa: BLE001 (of this request; its slot would never be free again)
                self._engine.close(slot)
                self._fail(request, _reason(error))
                ended = True
        return ended

    def _parts(self) -> list[tuple[_Active, Sequence[int]]]:
        """The tokens of the next pass of `forward`."""
        active = self._running.values()
        parts = [(a, a.todo) for a in active if not a.reading and not a.on_its_own]
        reading = self._reading()
        rows = self._engine.max_rows - len(parts)
        if any(not a.reading for a in active):
            rows = min(rows, self._pace.rows)
        if not reading or not rows:
            return parts
        scored = MAX_SCORED
        taken: dict[_Active, int] = dict.fromkeys(reading, 0)
        share = -(-rows // OLDEST_SHARE)
        for a, most in ((reading[0], share), *((a, rows) for a in sorted(reading, key=lambda a: len(a.todo)))):
            more = min(most, rows, len(a.todo) - taken[a], scored if a.scored else rows)
            taken[a] += more
            rows -= more
            scored -= more * a.scored
        return parts + [(a, a.todo[: taken[a]]) for a in active if taken.get(a)]

    def _reading(self) -> list[_Active]:
        """Whose prompts are read on: the one that came first, then the shortest rest. Who waits for what another of
        them is to compute, or for pages from disk, is left out."""
        reading = [a for a in self._running.values() if a.reading]
        reading[1:] = sorted(reading[1:], key=lambda a: len(a.todo))
        return [a for a in reading if not a.catch_up()]

    def _advance(self, active: _Active, logits: Tensor) -> None:
        """What a pass gave for a request; nothing where more of its prompt is to be read."""

        def next_piece() -> Piece | None:
            if active.scored:
                active.score(logits)
            if active.todo:
                return None
            if not active.limit:
                return Piece("", finished="length")
            piece = active.advance(logits[-1])
            if piece.finished is None:
                self._let_go(active)
            return piece

        self._give(active.request, next_piece)

    def _let_go(self, active: _Active) -> None:
        """From its latest token on the request decodes on its own, if the engine can do what it asks for."""
        how, engine = active.request.sampling, self._sampling
        if engine is None or active.request.constraint is not None or not engine.can_sample(how):
            return
        seed = secrets.randbits(64) if how.seed is None else how.seed % 2**64
        engine.begin(active.slot, active.todo[0], how, seed, active.limit - active.request.new_tokens)
        active.on_its_own = True

    def _give(self, request: Request, next_piece: Callable[[], Piece | None]) -> None:
        """Tells a request's reader what came, if anything; an error is the request's own."""
        try:
            piece = next_piece()
        except BaseException as error:  # noqa: BLE001 (it is of this request only)
            request.own_error = isinstance(error, AmqError)
            self._fail(request, _reason(error))
            return
        if piece is None:
            return
        if piece.finished is None:
            self._tell(request, piece)
        else:
            self._end(request, piece)

    def _fail_all(self, actives: Iterable[_Active], reason: str) -> None:
        for active in actives:
            if active.request in self._running:  # a listener may have cancelled it since
                self._fail(active.request, reason)

    def _fail(self, request: Request, reason: str) -> None:
        request.error = reason
        self._end(request, Piece("", finished="error"))

    def _end(self, request: Request, piece: Piece) -> None:
        """Frees the slot first, so that it is free whatever the listener does."""
        self._release(request)
        self._tell(request, piece)

    def _release(self, request: Request) -> None:
        active = self._running.pop(request, None)
        if active is None:
            return
        if active.on_its_own and self._sampling is not None:
            self._sampling.end(active.slot)
        self._engine.close(active.slot)

    def _tell(self, request: Request, piece: Piece) -> None:
        try:
            request.listener(piece)
        except Exception:  # one reader's failure is not the others'
            log.exception("a request's listener failed; the request ends")
            self._release(request)


def _reason(error: BaseException) -> str:
    """What a request's reader is told; what is not our own error is a defect, and logged.

    A panic of a Rust library is an error like any other, though Python has no Exception of it. What is meant for the
    whole process, such as KeyboardInterrupt, is raised again.
    """
    if not isinstance(error, Exception) and type(error).__name__ != PANIC:
        raise error
    if isinstance(error, AmqError):
        return str(error)
    log.error("a request ends because the engine failed", exc_info=error)
    return f"the engine failed ({type(error).__name__}: {error})"
