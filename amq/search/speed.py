"""Tokens per second as a budget: what the knapsack takes as times, and which configurations are fast enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amq.errors import AmqError
from amq.formats import KEPT
from amq.model.inventory import EMBEDDING, Inventory, LinearSpec
from amq.model.speed_table import SpeedTable
from amq.search.knapsack import price_of_time, select, select_in_time
from amq.search.space import SearchSpace

SLOWER = 1e-9
"""Relative: rounding of sums is no breach of the budget."""
TOLERANCE = 0.1
"""`--prefer speed` gives up so much of the best loss."""
PRICES = 24
"""At which `fastest` asks what is worth its time."""


@dataclass(frozen=True)
class Speed:
    """least: tokens/s that a user wants after `context` others, or None: then times are only said, or preferred."""

    table: SpeedTable
    space: SearchSpace
    others: tuple[LinearSpec, ...] = ()
    """Head and embeddings that are no part of the space: in 16 bits."""
    context: int = 0
    least: float | None = None

    @staticmethod
    def of(
        table: SpeedTable, inventory: Inventory, space: SearchSpace, context: int, least: float | None = None
    ) -> Speed:
        return Speed(table, space, unsearched(inventory, space), context, least)

    @cached_property
    def fixed(self) -> float:
        """Seconds of a token that no choice changes."""
        pinned = [s for s in self.space.weights if s.name in self.space.pinned]
        return (
            self.table.beside(self.context)
            + sum(self.table.of(s, self.space.pinned[s.name].name) for s in pinned)
            + sum(self.table.of(s, KEPT.name) for s in self.others)
        )

    @cached_property
    def times(self) -> np.ndarray:
        """Seconds per token, float64 [n_variables, most choices]; a variable with fewer repeats its last."""
        most = int(self.space.counts.max())
        rows = [
            [sum(self.table.of(s, choice.name) for s in variable) for choice in choices]
            for variable, choices in zip(self.space.variables, self.space.choices, strict=True)
        ]
        return np.array([row + row[-1:] * (most - len(row)) for row in rows])

    def seconds(self, formats: Mapping[str, str]) -> float:
        """Of a token, by the table."""
        chosen = self.space.encode(formats)
        return self.fixed + float(self.times[np.arange(len(chosen)), chosen].sum())

    def fits(self, formats: Mapping[str, str]) -> bool:
        return self.least is None or self.seconds(formats) * self.least <= 1 + SLOWER

    def select(self, costs: np.ndarray, capacity: float) -> np.ndarray:
        """The knapsack's choice within `capacity` bytes and the time; raises AmqError where nothing meets both."""
        if self.least is None:
            return select(costs, self.space.sizes, capacity)
        found = select_in_time(costs, self.space.sizes, capacity, self.times, 1 / self.least - self.fixed)
        if found is None:
            raise AmqError(self._contradiction(capacity))
        return found

    def fastest(self, costs: np.ndarray, capacity: float) -> list[np.ndarray]:
        """Choices within `capacity` from the cheapest to the fastest, as one gives up cost for time."""
        unit = price_of_time(costs, self.times)
        prices = [0.0, *(unit * 2.0 ** (i - PRICES // 2) for i in range(PRICES))]
        return [select(costs + price * self.times, self.space.sizes, capacity) for price in prices]

    def _contradiction(self, capacity: float) -> str:
        space, rows = self.space, np.arange(len(self.times))
        least = self.least or 0.0
        within = select(self.times, space.sizes, capacity)
        fastest = 1 / (self.fixed + float(self.times[rows, within].sum()))
        anyway = self.times.argmin(axis=1)
        ever = 1 / (self.fixed + float(self.times[rows, anyway].sum()))
        said = f"{least:g} tokens/s after {self.context} others cannot be met"
        if ever * (1 + SLOWER) < least:
            return f"{said}: the fastest formats reach {ever:.3g} here: give a lower --min-speed, or faster --formats"
        bits = float(space.bits(anyway))
        return (
            f"{said} within {8 * capacity / space.numel:.3f} bits per weight: there {fastest:.3g} tokens/s are the "
            f"most, and {bits:.3f} bits per weight are fast enough: give a lower --min-speed or a larger budget"
        )


def within(speed: Speed | None, costs: np.ndarray, space: SearchSpace, capacity: float) -> np.ndarray:
    """The knapsack's choice within `capacity` bytes, and within the time that a token may take, where that is asked."""
    return select(costs, space.sizes, capacity) if speed is None else speed.select(costs, capacity)


def unsearched(inventory: Inventory, space: SearchSpace) -> tuple[LinearSpec, ...]:
    """Head and embeddings that are no part of the space."""
    names = {s.name for s in space.weights}
    return tuple(s for s in inventory.outer if s.name not in names)


def wanted_times(inventory: Inventory, space: SearchSpace) -> dict[tuple[int, int], set[str]]:
    """{shape: formats that a weight of it may have}: what a speed table has to hold for `space`."""
    others = unsearched(inventory, space)
    wanted: dict[tuple[int, int], set[str]] = {}
    for variable, choices in zip(space.variables, space.choices, strict=True):
        for spec in (s for s in variable if s.kind != EMBEDDING):
            wanted.setdefault((spec.out_features, spec.in_features), set()).update(c.name for c in choices)
    fixed = [(s, space.pinned[s.name].name) for s in space.weights if s.name in space.pinned]
    for spec, name in (*fixed, *((s, KEPT.name) for s in others)):
        if spec.kind != EMBEDDING:
            wanted.setdefault((spec.out_features, spec.in_features), set()).add(name)
    return wanted
