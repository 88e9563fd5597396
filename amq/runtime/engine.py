"""What runs a model: `Engine`, forward passes over many sequences at once with their KV cache.

A pass takes *segments*: consecutive tokens of a sequence each, one token of a sequence that is being decoded, many of
one whose prompt is read. Several sequences share a pass, so several users share the reading of the weights.

Engines are used from one thread. They know tokens, not text; amq.runtime.scheduler makes passes out of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from amq.runtime.settings import Sampling

MAX_SCORED = 64
"""Tokens of a pass whose segments have `every`: each has a row of logits, up to a megabyte with a large vocabulary."""


class Slot:
    """A sequence's place in the KV cache, made by `Engine.open`.

    length: positions computed so far. capacity: positions that it has room for.
    """

    def __init__(self, capacity: int, length: int = 0) -> None:
        self.capacity, self.length = capacity, length

    def catch_up(self) -> bool:
        """Moves `length` on over tokens of the prompt that were computed elsewhere since the last call; call it before
        every pass for the slots whose prompt is being read, in the order in which passes serve them.

        Returns whether to leave the slot out of the next pass, because it will find more: another slot that was asked
        before computes the same tokens, or they are being read from disk. At least the last token is left to compute.
        """
        return False


S = TypeVar("S", bound=Slot)
"""The slots of one engine: it is given back those that it made, and adds to them what it has to know."""


@dataclass(frozen=True)
class Segment(Generic[S]):
    """`tokens` continue the sequence of `slot`.

    logits: whether those after the last token are wanted.
    every: those after each of them are, whatever `logits` says.
    """

    slot: S
    tokens: Sequence[int]
    logits: bool = True
    every: bool = False


class Engine(Protocol[S]):
    """A loaded model.

    banner: one line for people: which path runs it, on what, with which formats.
    context: positions that a sequence may have. max_rows: tokens of one pass, over all its segments.
    max_sequences: slots that can be open at once.
    """

    banner: str
    vocab_size: int
    context: int
    max_rows: int
    max_sequences: int

    def open(self, prompt: Sequence[int], new_tokens: int, owner: str = "", reuse: bool = True) -> S | None:
        """Room for a prompt and `new_tokens` more; None while other sequences hold what it needs.

        The slot's `length` may be above 0 where an earlier sequence of the same owner began with the same tokens: the
        caller goes on from there (always at most len(prompt) − 1, so that there is a token to compute). Without `reuse`
        it is 0.
        Raises AmqError where it could never fit.
        """

    def close(self, slot: S) -> None:
        """Gives the slot back; once per slot."""

    def forward(self, segments: Sequence[Segment[S]]) -> Tensor:
        """Runs one pass and moves every slot's `length` on.

        Returns float32 [logits that are wanted, vocab_size] on the CPU, in their order; valid until the next pass.
        Raises AmqError for more than `max_rows` tokens, more than MAX_SCORED in segments with `every`, a slot beyond
        its capacity, a token outside the vocabulary.
        """

    def cached_tokens(self) -> tuple[int, int]:
        """Positions of the KV cache in use by open slots, and all there are."""


@runtime_checkable
class SamplingEngine(Engine[S], Protocol[S]):
    """An engine that can also choose tokens itself, and feed each to the pass after it without a look from here.

    A slot *decodes on its own* from `begin` to `end`. Its tokens come back one pass late: `step` starts a pass and
    returns what the one before chose, so that the device has work while the host reads. A text that turns out to have
    ended has then been fed once too often; that is no harm, as it is never fed more than it has room for.

    Passes run in the order in which `step` and `forward` start them, so a slot may be closed and its memory be given to
    another while a pass that feeds it still runs.
    """

    def can_sample(self, how: Sampling) -> bool:
        """Whether a slot may decode on its own with these settings; never where `follows_from_logits` says no."""

    def begin(self, slot: S, token: int, how: Sampling, seed: int, passes: int) -> None:
        """From the next `step` on the slot decodes on its own: it is fed `token`, then what was chosen, `passes` times
        in all unless it is ended before.

        slot: computed up to `token`, with room for `passes` positions more. seed: from 0 to 2^64 − 1; all random
            numbers of the slot follow from it, whatever else runs. No other engine has to draw the same.
        """

    def step(self) -> dict[S, int]:
        """Starts a pass of the slots that decode on their own and have passes left, if there are any, and waits for the
        one that the call before started.

        Returns the tokens that the latter chose, without those of slots that were ended since; −1 where the logits were
        no numbers. A pass that fails raises, here or in the next call, and its slots have to be ended.
        """

    def end(self, slot: S) -> None:
        """The slot decodes on its own no more, and may be closed or take part in `forward`; its `length` is then what
        was fed. Never raises, and does not wait for a pass."""
