"""Where a sequence of `TorchEngine` runs that has a cache of its own, of transformers, which grows (static ones:
amq.runtime.torch_captured).

Every place knows which tokens its cache holds, so that a later sequence can go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Forward(Protocol):
    """A model's forward over its cache: int64 [sequences, n] → [sequences, vocabulary] after the last of them; with
    `every` [n, vocabulary] after each of the only sequence's. more: other arguments of the model's forward."""

    def __call__(self, tokens: Tensor, cache: Any, every: bool = False, **more: Tensor) -> Tensor: ...


class Batched(Protocol):
    """A cache of several sequences (amq.runtime.torch_batch)."""

    def give_back(self) -> None:
        """Gives each of them its own cache again."""


@dataclass(frozen=True)
class CachedModel:
    """A model, as places run it. new_cache: makes an empty cache that grows."""

    forward: Forward
    new_cache: Callable[[], Any]
    device: torch.device


class Growing:
    """A sequence whose cache grows as it goes.

    tokens, cache: what an earlier sequence has left to go on from.
    mark: tokens after which `snapshot` is called, once they are computed and before the next; 0: never.
    """

    def __init__(
        self,
        model: CachedModel,
        tokens: Sequence[int] = (),
        cache: Any = None,
        mark: int = 0,
        snapshot: Callable[[Growing], None] | None = None,
    ) -> None:
        self._model, self._mark, self._snapshot = model, mark, snapshot
        self._clear()
        self.tokens += tokens
        if cache is not None:
            self._cache = cache

    def _clear(self) -> None:
        self.tokens: list[int] = []
        """That the cache holds."""
        self.sound = True
        """Whether it does: not while a call computes more of them, nor after one that failed."""
        self._batch: Batched | None = None
        self._cache = self._model.new_cache()

    @property
    def cache(self) -> Any:
        """Its own one; a batch that holds it is taken apart."""
        if self._batch is not None:
            self._batch.give_back()
        return self._cache

    def join(self, batch: Batched) -> None:
        """`batch` holds its cache from now on."""
        self._batch, self._cache = batch, None

    def leave(self, cache: Any) -> None:
        """It has its own cache again."""
        self._batch, self._cache = None, cache

    @property
    def batch(self) -> Batched | None:
        return self._batch

    def reset(self) -> None:
        if self._batch is not None:
            self._batch.give_back()
        self._clear()

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None:
        """The logits [1, vocabulary] after the last token, with `every` [tokens, vocabulary] after each; None while it
        waits for more, which `logits` and `every` rule out."""
        first = self._mark - len(self.tokens)
        parts = (tokens[:first], tokens[first:]) if 0 < first < len(tokens) else (tokens,)
        rows = [self._read(part, every) for part in parts]
        return torch.cat(rows) if every else rows[-1]

    def _read(self, tokens: Sequence[int], every: bool = False) -> Tensor:
        cache = self.cache
        self.sound = False
        rows = self._model.forward(torch.tensor([list(tokens)], device=self._model.device), cache, every)
        self.add(tokens)
        if self._snapshot is not None and len(self.tokens) == self._mark:
            self._snapshot(self)
        return rows

    def add(self, tokens: Sequence[int]) -> None:
        """They have been computed."""
        self.tokens += tokens
        self.sound = True


class Stepping(Growing):
    """A sequence of a model that does not go on from its state with more than one token (checked: Mamba,
    RecurrentGemma): a prompt waits until it is whole, and what comes later goes token by token.

    mark: as of `Growing`, where one token comes after it.
    """

    def _clear(self) -> None:
        super()._clear()
        self._waiting: list[int] = []

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None:
        waiting = [*self._waiting, *tokens]
        if not (logits or every):
            self._waiting = waiting
            return None
        whole = 0 if self.tokens else len(waiting) - (len(tokens) - 1) * every
        if 0 < self._mark == whole - 1:
            whole = self._mark
        parts = [waiting[:whole]] * bool(whole) + [[token] for token in waiting[whole:]]
        self._waiting = []
        rows = [self._read(part) for part in parts]
        return torch.cat(rows[-len(tokens) :]) if every else rows[-1]
