"""Continuous batching: requests in, tokens and text out, as many at once as the engine holds.

Every `step` is one pass of the engine: one token of each sequence that is decoding, and as much of the waiting prompts as
fits. While anyone decodes, a pass reads at most `prefill_rows` tokens of prompts, so that a long prompt does not
hold up the others' next token; prompts that wait share them, the shortest rest first.

Not thread-safe: one thread submits, steps and cancels (amq.serve has a thread for it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from amq.runtime.engine import Engine
from amq.runtime.sampling import Choice, Sampling
from amq.runtime.tokenizer import Tokenizer


@dataclass
class Piece:
    """What a step added to a request's text.

    text: may be "" while a character or a possible stop text is incomplete. choices: the tokens of this step.
    finished: None, or `stop` (end token or stop text), `length` (max_new_tokens or the context), `cancelled`, `error`.
    """

    text: str
    choices: tuple[Choice, ...] = ()
    finished: str | None = None


@dataclass
class Request:
    """One text to be made.

    prompt: token ids. listener: called with every Piece, from the thread that steps; it must not block.
    """

    prompt: Sequence[int]
    sampling: Sampling
    listener: Callable[[Piece], None]
    new_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)  # of the prompt, that were computed for an earlier request
    error: str = field(default="", init=False)  # why `finished` is `error`


class Scheduler:
    """Runs requests on an engine, first come, first admitted."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prefill_rows: int = 128) -> None: ...

    def submit(self, request: Request) -> None:
        """Queues it. Raises AmqError at once where it can never run (empty prompt, prompt as long as the context)."""

    def cancel(self, request: Request) -> None:
        """Ends it, waiting or running, with a Piece `cancelled`; nothing happens if it has finished."""

    def step(self) -> bool:
        """One pass, if there is anything to do; returns whether there was."""

    @property
    def waiting(self) -> int:
        """Requests that hold no slot yet."""

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
