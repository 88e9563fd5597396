"""Losses that are made of a cost table: what predictors are tried on where thousands of true evaluations are too many.

With c_i the cost of variable i in its format and ε_i drawn evenly from −1 to 1 for neighbours in the model's order,

    T = Σ c_i + interaction · Σ ε_i √(c_i c_{i+1}),    loss = ln 2 · (1 − exp(−T / ln 2)),

so that costs are those of the table, add up but for what neighbours do to each other, and saturate as a Jensen–Shannon
divergence does. T is at least 0 where the interaction is at most 1. Outliers are variables that cost `factor` times as
much in the cheapest format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amq.model.losses import LN2
from amq.search.loss_curve import saturation
from amq.search.solvers.base import random_points
from amq.search.space import SearchSpace


@dataclass(frozen=True)
class SyntheticLosses:
    """costs: float64 [n_variables, n_formats], at least 0, nats per token. signs: float64 [n_variables − 1], the ε."""

    costs: np.ndarray
    signs: np.ndarray
    interaction: float

    @staticmethod
    def draw(costs: np.ndarray, interaction: float, rng: np.random.Generator) -> SyntheticLosses:
        return SyntheticLosses(costs, rng.uniform(-1, 1, len(costs) - 1), interaction)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Nats per token, float64 [n], of points [n, n_variables]."""
        own = additive(self.costs, points)
        root = np.sqrt(self.costs[np.arange(len(self.costs)), points])
        total = own + self.interaction * (self.signs * root[:, 1:] * root[:, :-1]).sum(axis=1)
        return LN2 * -np.expm1(-total / LN2)


def additive(costs: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Summed costs, float64 [n], of points [n, n_variables]: the knapsack's predictor."""
    return costs[np.arange(len(costs)), points].sum(axis=1)


def with_outliers(costs: np.ndarray, share: float, factor: float, rng: np.random.Generator) -> np.ndarray:
    """`costs`, of which that share of the variables, one at least, is `factor` times as much in the cheapest format."""
    changed = costs.copy()
    chosen = rng.choice(len(costs), size=max(1, round(share * len(costs))), replace=False)
    changed[chosen, 0] *= factor
    return changed


def measured_costs(losses: SyntheticLosses) -> tuple[np.ndarray, int]:
    """Costs as single evaluations show them, and how many these are: each variable in each format, all others in the
    widest, as `amq.search.sensitivity` has it."""
    n, m = losses.costs.shape
    base = np.full((1, n), m - 1)
    points = np.repeat(base, n * (m - 1), axis=0)
    variables, formats = np.repeat(np.arange(n), m - 1), np.tile(np.arange(m - 1), n)
    points[np.arange(len(points)), variables] = formats
    found = np.zeros((n, m))
    found[variables, formats] = saturation(losses(points)) - saturation(losses(base))
    return found, len(points) + 1


def without_widest(space: SearchSpace, count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Random points [count, n_variables] of all formats but the widest, which each variable has with probability
    `share` all the same."""
    narrow = SearchSpace(space.weights, space.formats[:-1], space.group_size, space.pinned, space.variables)
    points = random_points(narrow, count, rng)
    return np.where(rng.random(points.shape) < share, len(space.formats) - 1, points)
