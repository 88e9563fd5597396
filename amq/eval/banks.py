"""Configurations and uniform formats of a plain model, each assembled from a bank of that model."""

from __future__ import annotations

from amq.bank import BankRecipe, WeightBank
from amq.configuration import Configuration
from amq.linears import Inventory
from amq.models import LoadedModel, model_fingerprint
from amq.progress import Progress
from amq.swap import LinearSwap


class Banks:
    """Opens the banks that a table needs and puts configurations into the model."""

    def __init__(self, loaded: LoadedModel, parts: Inventory, swap: LinearSwap, progress: Progress) -> None:
        self._loaded, self._parts, self._progress = loaded, parts, progress
        self._fingerprint = model_fingerprint(loaded.model)
        self._open: dict[BankRecipe, WeightBank] = {}
        self._names: dict[BankRecipe, set[str]] = {}
        self._swap = swap

    def open(self, recipe: BankRecipe, formats: set[str]) -> None:
        """Builds or opens the bank while the model still holds its full-precision weights."""
        names = self._names.setdefault(recipe, set())
        if formats <= names:
            return
        names |= formats
        self._open[recipe] = recipe.open(self._loaded, self._parts, names, self._progress, self._fingerprint)

    def apply(self, configuration: Configuration, recipe: BankRecipe) -> None:
        self._swap.apply(configuration.formats, self._open[recipe])
