"""What sequences of `TorchEngine` leave behind: their caches with the tokens in them, for those that begin alike.

A cache is found by its owner alone. Where its end can be cut off it serves whatever begins like it, as far as the
tokens agree; where it cannot (a recurrent state, a window that is full) it serves what begins with all its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from amq.runtime.torch_cache import copied, cropped, is_whole, states, stored_bytes
from amq.util.files import is_out_of_memory

Usable = Callable[[int, int, int], bool]
"""(start, held, prompt) → whether a sequence may go on from `start` of the `held` positions of a cache to the end of
its prompt."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Kept:
    """crops: whether its end can be cut off. bytes: of its tensors."""

    owner: str
    tokens: Sequence[int]
    cache: Any = field(repr=False)
    crops: bool
    bytes: int

    def serves(self, owner: str, tokens: Sequence[int]) -> int:
        """How many of `tokens` it holds, from their beginning, that a sequence can go on from."""
        if self.owner != owner:
            return 0
        count = agreement(self.tokens, tokens)
        return count if self.crops or count == len(self.tokens) else 0


class KeptCaches:
    """most: caches at once. budget: bytes of all of them. The least recently used one goes first.

    crops: whether caches of this model can be cropped at all.
    """

    def __init__(self, most: int, budget: int, crops: bool, usable: Usable) -> None:
        self.most, self.budget = most, budget
        self._crops, self._usable = crops, usable
        self._kept: list[Kept] = []  # the least recently used first

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, owner: str, prompt: Sequence[int]) -> tuple[int, Any]:
        """(tokens, a copy of a cache that holds so many of the prompt's), at least the last one left out; (0, None)
        where nothing fits."""
        best, start = None, 0
        for kept in self._kept:
            count = kept.serves(owner, prompt[:-1])
            if count > start and self._usable(count, len(kept.tokens), len(prompt)):
                best, start = kept, count
        if best is None:
            return 0, None
        self._kept.remove(best)
        self._kept.append(best)
        try:
            return start, cropped(best.cache, len(best.tokens) - start)
        except (MemoryError, RuntimeError) as error:
            self._out_of_memory(error)
            return 0, None

    def keep(self, owner: str, tokens: Sequence[int], cache: Callable[[], Any], in_use: bool = False) -> None:
        """cache: gives the one that holds `tokens`; with `in_use` that is copied, else it is this object's from now on.
        A cache that serves no more than another one goes: one of a shorter beginning of the same text, where the longer
        one crops."""
        if not tokens or not self.most:
            return
        try:
            found = cache()
            size = sum(tensor.nbytes for _, tensor in states(found))
            if not size or size > self.budget:
                return
            if in_use or stored_bytes(found) > size:
                found = copied(found)
        except (MemoryError, RuntimeError) as error:
            self._out_of_memory(error)
            return
        new = Kept(owner, tuple(tokens), found, self._crops and is_whole(found, len(tokens)), size)
        for kept in list(self._kept):
            if kept.serves(owner, new.tokens) == len(new.tokens):
                self._kept.remove(kept)
                new = kept
            elif new.serves(kept.owner, kept.tokens) == len(kept.tokens):
                self._kept.remove(kept)
        self._kept.append(new)
        while len(self._kept) > self.most or self.bytes > self.budget:
            del self._kept[0]

    def _out_of_memory(self, error: BaseException) -> None:
        """What is kept is not worth a request: it all goes."""
        if not is_out_of_memory(error):
            raise error
        log.warning("no memory to keep what was read: %s", str(error).splitlines()[0])
        self._kept.clear()


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
