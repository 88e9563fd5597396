"""Pareto front and hypervolume over (bits per weight, loss), both minimised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amq.model.losses import LN2

REFERENCE_LOSS = 0.70
"""Just above ln 2, the largest divergence: the hypervolume's reference, together with the largest bits per weight."""


def reference_loss(ceiling: float) -> float:
    """As far above another objective's largest loss."""
    return REFERENCE_LOSS * ceiling / LN2


def pareto_indices(points: np.ndarray) -> list[int]:
    """Indices of the non-dominated rows of float [n, 2], by rising bits; of equal rows the first."""
    order = np.lexsort((np.arange(len(points)), points[:, 1], points[:, 0]))
    front, best = [], np.inf
    for index in order:
        if points[index, 1] < best:
            best = points[index, 1]
            front.append(int(index))
    return front


def hypervolume(points: np.ndarray, bits_range: tuple[float, float], reference: float = REFERENCE_LOSS) -> float:
    """Dominated share of the box [low bits, high bits] × [0, reference]; points float [n, 2] (bits, loss)."""
    from pymoo.indicators.hv import HV

    low, high = bits_range
    if not len(points) or high <= low:
        return 0.0
    scaled = np.column_stack([(points[:, 0] - low) / (high - low), points[:, 1] / reference])
    # a point on the reference itself dominates nothing, so the right end gets a hair of room
    return float(HV(ref_point=np.array([1.0 + 1e-9, 1.0]))(scaled))


def spread(values: np.ndarray, anchors: Sequence[float], count: int) -> list[int]:
    """Greedy farthest-point choice: `count` indices of `values` [n] that lie far from `anchors` and from each other."""
    distance = np.full(len(values), np.inf)
    for anchor in anchors:
        distance = np.minimum(distance, np.abs(values - anchor))
    chosen: list[int] = []
    for _ in range(min(count, len(values))):
        index = int(distance.argmax())
        chosen.append(index)
        distance = np.minimum(distance, np.abs(values - values[index]))
        distance[index] = -np.inf
    return chosen
