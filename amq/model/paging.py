"""Which blocks of a model have their weights in memory.

A model that was loaded whole has all of them, always. One that is larger than memory has a `Pager` and holds few blocks
at once; every stage that reads or writes weights of a block does so while it is `holding` that block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

ATTRIBUTE = "_amq_pager"


class Pager(Protocol):
    """Brings the weights of blocks into memory."""

    def holding(self, block: int) -> AbstractContextManager[None]: ...


def pager_of(model: nn.Module) -> Pager | None:
    """None of a model whose weights are all in memory."""
    return getattr(model, ATTRIBUTE, None)


def holding(model: nn.Module, block: int) -> AbstractContextManager[None]:
    """Inside, the weights of that block are in memory, and what is changed in them counts."""
    pager = pager_of(model)
    return nullcontext() if pager is None else pager.holding(block)
