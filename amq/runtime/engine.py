"""What runs a model: `Engine`, forward passes over many sequences at once with their KV cache.

A pass takes *segments*: consecutive tokens of a sequence each, one token of a sequence that is being decoded, many of
one whose prompt is read. Several sequences share a pass, so several users share the reading of the weights.

Engines are used from one thread. They know tokens, not text; amq.runtime.scheduler makes passes out of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

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
