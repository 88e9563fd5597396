"""Where each weight of a model is in a GGUF file, and how it was changed on its way there; both directions read this.

A name is transformers', with `.weight` or `.bias`, that of experts without their number: the experts of a layer and
role are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amq.errors import AmqError
from amq.model.gguf.families import Change, Family
from amq.model.gguf.orders import Config, Numbers

SUFFIXES = (".weight", ".bias", ".scale")


@dataclass(frozen=True)
class Place:
    """A tensor of the file that holds a weight or a part of its rows.

    numbers: the change of its numbers. rows(number of the weight's rows): int64, which of them come here, in order;
    None for all. blocks: the same for input features, in blocks of `orders.BLOCK`.
    """

    name: str
    numbers: Numbers | None = None
    rows: Callable[[int], Tensor] | None = None
    blocks: Tensor | None = None


class Places:
    """Of one model. Raises AmqError where the gguf package is older than the architecture."""

    def __init__(self, family: Family, config: Config, layers: int) -> None:
        import gguf

        self.family, self._config = family, config
        arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch), None)
        if arch is None:
            raise AmqError(f"the installed gguf package does not know {family.arch}: install a newer one")
        self._names: Any = gguf.get_tensor_name_map(arch, layers)

    def of(self, name: str) -> list[Place]:
        """Raises AmqError where llama.cpp has no place for the weight `name`."""
        changes = [change for change in self.family.changes if re.search(change.name, name)]
        parts = next((change.split for change in changes if change.split), (Change(""),))
        return [self._place(name, [*changes, part]) for part in parts]

    def has(self, name: str) -> bool:
        """Whether gguf's own table knows the weight `name`, unchanged."""
        return self._names.get_name(name, try_suffixes=SUFFIXES) is not None

    def _place(self, name: str, changes: Sequence[Change]) -> Place:
        rows = next((change.rows for change in changes if change.rows), None)
        blocks = next((change.blocks for change in changes if change.blocks), None)
        return Place(
            self._target(name, changes),
            next((change.numbers for change in changes if change.numbers), None),
            None if rows is None else lambda count: rows(self._config, count),
            None if blocks is None else blocks(self._config),
        )

    def _target(self, name: str, changes: Sequence[Change]) -> str:
        full = name
        for change in changes:
            what, by = change.rename
            full = full.replace(what, by) if what else full
            if change.place:
                return re.sub(change.name, change.place, name)
        target: str | None = self._names.get_name(full, try_suffixes=SUFFIXES)
        if target is None:
            raise AmqError(f"llama.cpp's {self.family.arch} has no place for {name}")
        return target
