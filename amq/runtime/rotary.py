"""Rotary tables that depend on how long a text is, and sequences that are right all the same.

A model of transformers chooses such tables by the last position of each call: `longrope` (Phi-3.5, Phi-4) has one for
texts up to a border and one for longer ones, `dynamic` another for every length beyond it. Keys that are cached were
turned by the table of their own call, so a text that is read in parts would mix tables. Here every row of logits is the
one that a single call over the whole text gives: where the table changes, everything before is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from amq.model.shape import ModelShape, size

LONG = frozenset({"longrope", "su"})
"""Names of the kind with one border; the second one is of Phi-3's first files."""


class Sequential(Protocol):
    """What a slot holds: see amq.runtime.torch_places."""

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None: ...

    def reset(self) -> None: ...


class RotaryTables:
    """What a model's config says of its tables.

    shorten: runs a short text. A dynamic table stays as long as the longest text that it has seen, whosever that was,
        until a text within the border comes.
    """

    def __init__(self, config: Any, shorten: Callable[[], None]) -> None:
        self._borders: set[int] = set()
        self.dynamic: int | None = None
        """Positions beyond which every length has a table of its own."""
        for rotary in ModelShape.of(config).rotary.values():
            if rotary.kind in LONG:
                border = "original_max_position_embeddings"
                self._borders.add(size(rotary.parameters, border) or size(config, border) or 0)
            elif "dynamic" in rotary.kind:
                self.dynamic = config.max_position_embeddings
                self._borders.add(self.dynamic)
        self._shorten, self._longest = shorten, float("inf")

    def __bool__(self) -> bool:
        """Whether there are any that depend on the length."""
        return bool(self._borders)

    def change(self, done: int, length: int) -> bool:
        """Whether a text of `length` needs other tables than its first `done` positions have been computed with."""
        growing = self.dynamic is not None and length > max(self.dynamic, done)
        return done > 0 and (growing or any(done <= border < length for border in self._borders))

    def prepare(self, length: int) -> None:
        """Before a call that reaches `length` positions: takes back what a longer text has left in the model."""
        if self.dynamic is None:
            return
        if self._longest > length >= self.dynamic:  # below it, the model itself does
            self._shorten()
        self._longest = max(length, self.dynamic)


class Renewed:
    """A sequence whose cache is computed anew, in one call, where its tables change.

    prompt: tokens that will surely come. What is read of them before a change is kept until it has happened.
    text: that `sequence` holds already, with the tables that a text of the prompt's length has.
    """

    def __init__(self, sequence: Sequential, tables: RotaryTables, prompt: int, text: Sequence[int] = ()) -> None:
        self._sequence, self._tables, self._prompt = sequence, tables, prompt
        self._text = list(text)
        self._done = len(self._text)

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None:
        if every and len(tokens) > 1 and self._tables.change(max(self._done, 1), len(self._text) + len(tokens)):
            return torch.cat([row for token in tokens if (row := self.run([token], True, True)) is not None])
        self._text += tokens
        length = len(self._text)
        if not (logits or every) and self._tables.change(length, self._prompt):
            return None
        if self._tables.change(self._done, length):
            self._sequence.reset()
            self._done = 0
        part, self._done = self._text[self._done :], length
        self._tables.prepare(length)
        found = self._sequence.run(part, logits, every)
        return found[-len(tokens) :] if every and found is not None else found
