"""One text, streamed: a request of its own on the model's engine.

Times are taken when a token has been chosen, so that decoding and printing text are not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from amq.errors import AmqError
from amq.runtime.loading import Runtime
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or a conversation [{"role": "user", "content": …}, …] that the model's chat template makes a text of."""


@dataclass
class Generation:
    """The text as it comes; iterate over it once. The figures are complete when the iteration has ended.

    prompt_tokens: how many were given. times: of the start and of every new token, seconds (time.perf_counter).
    finished: why it ended, as in `Piece`; None until then.
    """

    prompt_tokens: int
    pieces: Iterator[str] = field(repr=False, default=iter(()))
    times: list[float] = field(default_factory=list, repr=False)
    finished: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    @property
    def new_tokens(self) -> int:
        return max(len(self.times) - 1, 0)

    @property
    def first_token_seconds(self) -> float:
        """From the start until the first new token was chosen; preparing weights counts where they are used first."""
        return self.times[1] - self.times[0] if self.new_tokens else float("nan")

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.first_token_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; NaN where there are none."""
        steps = self.new_tokens - 1
        return steps / (self.times[-1] - self.times[1]) if steps > 0 else float("nan")


def generate(runtime: Runtime, prompt: Prompt, sampling: Sampling | None = None) -> Generation:
    """Starts to generate when the result is iterated over; leaving the loop early stops the model.

    Raises AmqError for an empty prompt, one that fills the model's context, and a conversation without chat template;
    while it is iterated over, where the model fails.
    """
    tokens = encode(runtime, prompt)
    arrived: deque[tuple[float, Piece]] = deque()
    request = Request(tokens, sampling or Sampling(), lambda piece: arrived.append((time.perf_counter(), piece)))
    scheduler = Scheduler(runtime.engine, runtime.tokenizer)
    scheduler.submit(request)
    generation = Generation(len(tokens))
    generation.pieces = _stream(scheduler, request, arrived, generation)
    return generation


def encode(runtime: Runtime, prompt: Prompt) -> list[int]:
    """Token ids of a prompt."""
    if not isinstance(prompt, str):
        return runtime.tokenizer.encode_chat(prompt).tokens
    if not prompt:
        raise AmqError("the prompt is empty: give some text")
    return runtime.tokenizer.encode(prompt)


def _stream(
    scheduler: Scheduler, request: Request, arrived: deque[tuple[float, Piece]], generation: Generation
) -> Iterator[str]:
    generation.times.append(time.perf_counter())
    try:
        while generation.finished is None:
            scheduler.step()
            while arrived:
                at, piece = arrived.popleft()
                generation.times += [at] * len(piece.choices)
                generation.finished = piece.finished
                if piece.finished == "error":
                    raise AmqError(request.error)
                if piece.text:
                    yield piece.text
    finally:
        scheduler.cancel(request)  # which does nothing where it has finished
