"""Configurations and uniform formats of a plain model, each assembled from a bank of that model."""

from __future__ import annotations

from amq.configuration import Configuration
from amq.model.opened import OpenModel
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankRecipe, WeightBank
from amq.util.progress import Progress

Key = tuple[BankRecipe, frozenset[str]]
"""A recipe and the weights that are quantized: a bank is of those, without what a configuration keeps."""
LINEARS = ""
"""Among names of heads and embeddings: all linears of the blocks, which have the same formats in a bank."""


class Banks:
    """Opens the banks that a table needs and puts configurations into the model."""

    def __init__(self, opened: OpenModel, swap: LinearSwap, progress: Progress) -> None:
        self._opened, self._fingerprint, self._progress = opened, opened.fingerprint, progress
        self._open: dict[Key, WeightBank] = {}
        self._formats: dict[Key, dict[str, set[str]]] = {}
        self._swap = swap

    def open(self, recipe: BankRecipe, configuration: Configuration) -> None:
        """Builds or opens the bank while the model still holds its full-precision weights."""
        key, inventory, formats = _key(recipe, configuration), self._opened.inventory, configuration.quantized
        wanted = {LINEARS: {formats[s.name] for s in inventory.linears if s.name in formats}}
        wanted |= {s.name: {formats[s.name]} for s in inventory.outer if s.name in formats}
        there = self._formats.setdefault(key, {})
        if all(some <= there.get(name, set()) for name, some in wanted.items()):
            return
        for name, some in wanted.items():
            there.setdefault(name, set()).update(some)
        outer = {name: some for name, some in there.items() if name != LINEARS}
        self._open[key] = recipe.open(
            self._opened.loaded, inventory.only(formats), there[LINEARS], self._progress, self._fingerprint, outer
        )

    def apply(self, configuration: Configuration, recipe: BankRecipe) -> None:
        self._swap.apply(configuration.formats, self._open[_key(recipe, configuration)])


def _key(recipe: BankRecipe, configuration: Configuration) -> Key:
    return recipe, frozenset(configuration.quantized)
