"""Configurations and uniform formats of a plain model, each assembled from a bank of that model."""

from __future__ import annotations

from amq.configuration import Configuration
from amq.model.opened import OpenModel
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankRecipe, WeightBank
from amq.util.progress import Progress

Key = tuple[BankRecipe, frozenset[str]]
"""A recipe and the linears that are quantized: a bank is of those, without what a configuration keeps."""


class Banks:
    """Opens the banks that a table needs and puts configurations into the model."""

    def __init__(self, opened: OpenModel, swap: LinearSwap, progress: Progress) -> None:
        self._opened, self._fingerprint, self._progress = opened, opened.fingerprint, progress
        self._open: dict[Key, WeightBank] = {}
        self._names: dict[Key, set[str]] = {}
        self._swap = swap

    def open(self, recipe: BankRecipe, configuration: Configuration) -> None:
        """Builds or opens the bank while the model still holds its full-precision weights."""
        key = _key(recipe, configuration)
        names = self._names.setdefault(key, set())
        formats = set(configuration.quantized.values())
        if formats <= names:
            return
        names |= formats
        inventory = self._opened.inventory.only(configuration.quantized)
        self._open[key] = recipe.open(self._opened.loaded, inventory, names, self._progress, self._fingerprint)

    def apply(self, configuration: Configuration, recipe: BankRecipe) -> None:
        self._swap.apply(configuration.formats, self._open[_key(recipe, configuration)])


def _key(recipe: BankRecipe, configuration: Configuration) -> Key:
    return recipe, frozenset(configuration.quantized)
