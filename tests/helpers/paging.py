"""A pager that has all weights and hides them: what is read of a block that nobody holds is NaN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from amq.model.inventory import find_blocks
from amq.model.paging import ATTRIBUTE, pager_of


class PoisonPager:
    """Makes `model` look like one that is larger than memory.

    A forward through a block that is not held brings its weights in and out by itself, as a real pager does; `strays`
    counts these, and a stage that goes through a model block by block must not cause any. `held` is the list of blocks
    in the order in which they were brought in by `holding`.
    """

    def __init__(self, model: nn.Module) -> None:
        _, blocks = find_blocks(model)
        self._parameters = [list(block.parameters()) for block in blocks]
        self._real: list[list[Tensor]] = [[p.data for p in some] for some in self._parameters]
        self._holders: Counter[int] = Counter()
        self.strays, self.held, self.checked = 0, [], False
        for index, block in enumerate(blocks):
            self._poison(index)
            block.register_forward_pre_hook(lambda *args, index=index: self._before(index))
            block.register_forward_hook(lambda *args, index=index: self._after(index), always_call=True)
        setattr(model, ATTRIBUTE, self)
        self._alone: set[int] = set()

    @contextmanager
    def holding(self, block: int) -> Iterator[None]:
        if not self._holders[block]:
            self.held.append(block)
        self._enter(block)
        try:
            yield
        finally:
            self._leave(block)

    def _before(self, block: int) -> None:
        if not self._holders[block]:
            self.strays += 1
            self._alone.add(block)
            self._enter(block)

    def _after(self, block: int) -> None:
        if block in self._alone:
            self._alone.remove(block)
            self._leave(block)

    def _enter(self, block: int) -> None:
        if not self._holders[block]:
            for parameter, real in zip(self._parameters[block], self._real[block], strict=True):
                parameter.data = real
        self._holders[block] += 1

    def _leave(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            self._real[block] = [p.data for p in self._parameters[block]]
            self._poison(block)

    def _poison(self, block: int) -> None:
        for parameter in self._parameters[block]:
            parameter.data = torch.full_like(parameter.data, torch.nan)

    def weights(self, block: int) -> list[Tensor]:
        """What a block's parameters are, or would be while it is held."""
        return [p.data for p in self._parameters[block]] if self._holders[block] else self._real[block]


def assert_only_held(pager: PoisonPager, call: Any) -> Any:
    """What `call()` returns; no forward went through a block that was not held."""
    before = pager.strays
    result = call()
    assert pager.strays == before, f"{pager.strays - before} forwards went through blocks that nobody held"
    return result


def realign(model: nn.Module) -> None:
    """Gives every weight of a real model an allocation of its own, those of a model on disk each time they are read.

    Products may depend in their last bits on where a weight lies and how far its rows are apart, on some processors:
    in a mapped file, or in a parameter that many experts share.
    """

    def own(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    pager = pager_of(model)
    own(model.parameters() if pager is None else (value for _, value in pager.outside(model)))
    for block, part in enumerate(pager.parts if pager is not None else ()):
        pager.after_reading(block, lambda part=part: own(part.parameters()))
