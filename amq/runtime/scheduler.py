"""Continuous batching: requests in, tokens and text out, as many at once as the engine holds.

Every `step` is one pass of the engine: one token of each sequence that is decoding, and as much of the waiting prompts
as fits. While anyone decodes, a pass reads at most `prefill_rows` tokens of prompts, so that a long prompt does not
hold up the others' next token; prompts that wait share them, the shortest rest first, but for a quarter that goes to
the one that came first, so that none waits forever.

Not thread-safe: one thread submits, steps and cancels (amq.serve has a thread for it).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from amq.errors import AmqError
from amq.runtime.engine import Engine, Segment, Slot
from amq.runtime.sampling import Choice, Constraint, Sampler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import TextStream, Tokenizer

OLDEST_SHARE = 4
"""The prompt that came first gets at least this part (a quarter) of the tokens of prompts that a pass reads."""

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


class _Active:
    """A request that holds a slot. todo: its tokens that are not computed yet; reading: those are of the prompt."""

    def __init__(self, request: Request, slot: Slot, tokenizer: Tokenizer, limit: int) -> None:
        self.request, self.slot, self.limit = request, slot, limit
        self.sampler = Sampler(request.sampling, request.prompt)
        self.stream = TextStream(tokenizer, request.sampling.stop)
        self.todo: Sequence[int] = request.prompt[slot.length :]
        self.reading = True


class Scheduler:
    """Runs requests on an engine, first come, first admitted."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prefill_rows: int = 128) -> None:
        if not 1 <= engine.max_sequences <= engine.max_rows:
            raise AmqError(f"expected 1 to {engine.max_rows} sequences at once, got {engine.max_sequences}")
        if prefill_rows < 1:
            raise AmqError(f"prefill_rows must be at least 1, got {prefill_rows}")
        self._engine, self._tokenizer, self._prefill_rows = engine, tokenizer, prefill_rows
        self._waiting: deque[Request] = deque()
        self._running: dict[Request, _Active] = {}  # in the order in which they came

    def submit(self, request: Request) -> None:
        """Queues it. Raises AmqError at once where it can never run (empty prompt, prompt as long as the context)."""
        length, context = len(request.prompt), self._engine.context
        if not length:
            raise AmqError("the prompt is empty: give some text")
        if length >= context:
            raise AmqError(f"the prompt has {length} tokens, the model's context {context}: give a shorter one")
        if min(request.prompt) < 0 or max(request.prompt) >= self._engine.vocab_size:
            raise AmqError(
                f"the prompt has a token id outside the model's vocabulary of {self._engine.vocab_size}: the tokenizer "
                "is not this model's"
            )
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
        parts = self._parts()
        segments = [Segment(active.slot, tokens, len(tokens) == len(active.todo)) for active, tokens in parts]
        try:
            logits = self._engine.forward(segments)
        except Exception as error:  # noqa: BLE001 (whatever it is, what the slots hold is no longer known)
            for active, _ in parts:
                self._fail(active.request, _reason(error))
            return True
        for active, tokens in parts:
            active.todo = active.todo[len(tokens) :]
        ready = [active for active, _ in parts if not active.todo]
        for row, active in enumerate(ready):
            if active.request in self._running:  # a listener may have cancelled it since
                self._choose(active, logits[row])
        return True

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
                slot = self._engine.open(request.prompt, limit)
                if slot is None and not self._running:
                    raise AmqError("the engine has no room: something else runs on it")
            except Exception as error:  # noqa: BLE001 (it waits first in line: nobody would come after it)
                self._waiting.popleft()
                self._fail(request, _reason(error))
                ended = True
                continue
            if slot is None:
                break
            self._waiting.popleft()
            request.cached_tokens = slot.length
            self._running[request] = _Active(request, slot, self._tokenizer, limit)
        return ended

    def _parts(self) -> list[tuple[_Active, Sequence[int]]]:
        """The tokens of the next pass."""
        active = self._running.values()
        parts = [(a, a.todo) for a in active if not a.reading]
        reading = [a for a in active if a.reading]
        rows = self._engine.max_rows - len(parts)
        if parts:
            rows = min(rows, self._prefill_rows)
        if not reading or not rows:
            return parts
        oldest, share = reading[0], -(-rows // OLDEST_SHARE)
        taken = {oldest.request: min(share, len(oldest.todo))}
        rows -= taken[oldest.request]
        for a in sorted(reading, key=lambda a: len(a.todo)):
            more = min(rows, len(a.todo) - taken.get(a.request, 0))
            taken[a.request] = taken.get(a.request, 0) + more
            rows -= more
        return parts + [(a, a.todo[: taken[a.request]]) for a in reading if taken[a.request]]

    def _choose(self, active: _Active, logits: Tensor) -> None:
        request = active.request
        try:
            choice = active.sampler.choose(logits)
        except Exception as error:  # noqa: BLE001 (it is of this request only)
            self._fail(request, _reason(error))
            return
        request.new_tokens += 1
        active.todo, active.reading = (choice.token,), False
        ended = choice.token in self._tokenizer.end_ids and not request.sampling.ignore_end
        text = "" if ended else active.stream.push(choice.token)
        finished = None
        if ended or active.stream.stopped:
            finished = "stop"
        elif request.new_tokens >= active.limit:
            finished = "length"
        if finished is None:
            self._tell(request, Piece(text, (choice,)))
            return
        text += active.stream.finish()  # the rest may hold a stop text yet: half a character before it was pending
        self._end(request, Piece(text, (choice,), "stop" if active.stream.stopped else finished))

    def _fail(self, request: Request, reason: str) -> None:
        request.error = reason
        self._end(request, Piece("", finished="error"))

    def _end(self, request: Request, piece: Piece) -> None:
        """Frees the slot first, so that it is free whatever the listener does."""
        active = self._running.pop(request, None)
        if active is not None:
            self._engine.close(active.slot)
        self._tell(request, piece)

    def _tell(self, request: Request, piece: Piece) -> None:
        try:
            request.listener(piece)
        except Exception:  # one reader's failure is not the others'
            log.exception("a request's listener failed; the request ends")
            active = self._running.pop(request, None)
            if active is not None:
                self._engine.close(active.slot)


def _reason(error: Exception) -> str:
    """What a request's reader is told; what is not our own error is a defect, and logged."""
    if isinstance(error, AmqError):
        return str(error)
    log.error("a request ends because the engine failed", exc_info=error)
    return f"the engine failed ({type(error).__name__}: {error})"
