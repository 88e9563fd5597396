"""From additive cost to loss: loss ≈ c · (1 − exp(−a · s^p)), with s the sum of a configuration's costs.

Two parameters, monotone, zero at zero and bounded by the objective's ceiling c, of the Jensen–Shannon divergence ln 2.
With T = −ln(1 − loss/c) it is a line in log–log: ln T = ln a + p · ln s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from amq.formats import quantized_formats
from amq.model.losses import LN2
from amq.search.archive import Record


def saturation(loss: np.ndarray, ceiling: float = LN2) -> np.ndarray:
    """T = −ln(1 − loss/ceiling): additive where the loss itself saturates, and large where it is the ceiling."""
    return -np.log1p(-np.minimum(np.asarray(loss, dtype=float) / ceiling, 1 - 1e-9))


@dataclass(frozen=True)
class LossFit:
    """The fitted curve and how well it ranks and predicts the evaluations it was fitted to."""

    a: float
    p: float
    points: int
    rmse: float
    spearman: float
    kendall: float
    ceiling: float = LN2

    def predict(self, cost: np.ndarray | float) -> np.ndarray:
        """Loss at summed cost ≥ 0."""
        return self.ceiling * -np.expm1(-self.a * np.maximum(cost, 0.0) ** self.p)


def fit_loss(cost: np.ndarray, loss: np.ndarray, ceiling: float = LN2) -> LossFit | None:
    """Least squares in log–log over evaluations with cost, loss > 0 (both [n]); None below two distinct ones.

    Where the data would make the curve fall (p ≤ 0: noise among near-equal costs) p is 1 and only `a` is fitted.
    """
    from amq.search.scores import quality

    cost, loss = np.asarray(cost, dtype=float), np.asarray(loss, dtype=float)
    use = (cost > 0) & (loss > 0) & np.isfinite(loss)
    cost, loss = cost[use], loss[use]
    if len(np.unique(cost)) < 2:
        return None
    x, y = np.log(cost), np.log(saturation(loss, ceiling))
    p = float(np.cov(x, y, bias=True)[0, 1] / x.var())
    if p <= 0:
        p = 1.0
    a = float(np.exp((y - p * x).mean()))
    predicted = ceiling * -np.expm1(-a * cost**p)
    return LossFit(a, p, len(cost), **quality(loss, predicted), ceiling=ceiling)


def table_cost(table: Mapping[str, Mapping[str, float]], formats: Mapping[str, str]) -> float:
    """Summed cost of a configuration {linear: format} over a table {linear: {format: cost}}; kept ones cost nothing."""
    return sum(table[name][fmt] for name, fmt in quantized_formats(formats).items())


def fit_records(
    records: Sequence[Record], table: Mapping[str, Mapping[str, float]], ceiling: float = LN2
) -> LossFit | None:
    """The fit over feasible archive records on the search windows."""
    used = [r for r in records if r.windows == "search" and r.loss is not None]
    costs = np.array([table_cost(table, r.configuration) for r in used])
    return fit_loss(costs, np.array([r.loss for r in used]), ceiling)
