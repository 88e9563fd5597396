"""Requests whose readers collect what comes, and a scheduler run until all have ended, on engines that only count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from amq.runtime.engine import Segment
from amq.runtime.sampling import Constraint
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer
from helpers.engines import FakeEngine, FakeSlot
from helpers.tiny_models import byte_tokenizer

TOKENIZER = Tokenizer.from_transformers(byte_tokenizer(), [])
LETTERS = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")


def letter(tokens: Sequence[int]) -> int:
    """Follows from all tokens before it; text of one byte per token."""
    return LETTERS[(sum(tokens) * 31 + len(tokens)) % 26]


class Reader:
    """A request's listener: collects."""

    def __init__(self, prompt: Sequence[int] | str, constraint: Constraint | None = None, **sampling: Any) -> None:
        self.pieces: list[Piece] = []
        tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        self.request = Request(tokens, Sampling(**sampling), self.pieces.append, "its owner", constraint)

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


class Clock:
    """What a pass takes: a constant, and more for each token."""

    def __init__(self, engine: FakeEngine, seconds: float, per_token: float) -> None:
        self.now, self.seconds, self.per_token = 0.0, seconds, per_token
        forward = engine.forward

        def timed(segments: Sequence[Segment[FakeSlot]]) -> torch.Tensor:
            self.now += self.seconds + self.per_token * sum(len(segment.tokens) for segment in segments)
            return forward(segments)

        engine.forward = timed  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now
