"""Configurations and uniform formats of a plain model, each assembled from a bank of that model."""

from __future__ import annotations

from dataclasses import dataclass

from amq.bank import BankSettings, WeightBank, open_bank
from amq.configuration import Configuration
from amq.data import WindowSampler, load_corpus
from amq.formats import get_format
from amq.linears import Inventory
from amq.models import LoadedModel, model_fingerprint
from amq.progress import Progress
from amq.swap import LinearSwap


@dataclass(frozen=True)
class Recipe:
    """What names a bank of one model."""

    proxy: str
    group_size: int
    calibration: str
    bank_windows: int
    window_length: int
    seed: int

    @staticmethod
    def of(configuration: Configuration, fallback: Recipe) -> Recipe:
        """The bank a configuration was searched on; a hand-written one without provenance takes the flags'."""
        provenance = configuration.details.get("provenance") or {}
        names = ("proxy", "calibration", "bank_windows", "window_length", "seed")
        given = {n: provenance.get(n, getattr(fallback, n)) for n in names}
        return Recipe(group_size=configuration.group_size, **given)


class Banks:
    """Opens the banks that a table needs and puts configurations into the model."""

    def __init__(self, loaded: LoadedModel, parts: Inventory, swap: LinearSwap, progress: Progress) -> None:
        self._loaded, self._parts, self._progress = loaded, parts, progress
        self._fingerprint = model_fingerprint(loaded.model)
        self._open: dict[Recipe, WeightBank] = {}
        self._names: dict[Recipe, set[str]] = {}
        self._swap = swap

    def open(self, recipe: Recipe, formats: set[str]) -> None:
        """Builds or opens the bank while the model still holds its full-precision weights."""
        names = self._names.setdefault(recipe, set())
        if formats <= names:
            return
        names |= formats
        corpus = load_corpus(recipe.calibration, self._loaded.tokenizer)
        windows = WindowSampler(corpus, recipe.window_length, recipe.seed).take(recipe.bank_windows)
        self._open[recipe] = open_bank(
            self._loaded.model, self._parts, sorted((get_format(n) for n in names), key=lambda f: f.code_bits),
            BankSettings(recipe.proxy, recipe.group_size, windows), self._progress, fingerprint=self._fingerprint,
        )  # fmt: skip

    def apply(self, configuration: Configuration, recipe: Recipe) -> None:
        self._swap.apply(configuration.formats, self._open[recipe])
