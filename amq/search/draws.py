"""Random points of a space: spread over all sizes, or of about one size, where a search has to choose.

Points are of spaces whose variables have the same choices: linears of the blocks, without head and embeddings.
"""

from __future__ import annotations

import numpy as np

from amq.errors import AmqError
from amq.search.choose import check_bits
from amq.search.solvers.base import random_points
from amq.search.space import SearchSpace

TRIES, ROUNDS = 50, 4
"""Beginnings per point that is wanted; steps per variable, from a beginning to a size."""


def spread_points(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count, n_variables]: the mean position between the cheapest and the dearest format is spread evenly.

    Each variable draws its format by itself: near an end of the range from the formats of that end, with probabilities
    that a normal density of one format's width around the wanted position gives.
    """
    positions = np.arange(len(space.formats))
    points = np.empty((count, len(space.variables)), dtype=np.int64)
    for index in range(count):
        wanted = (index + 0.5) / count * (len(positions) - 1)
        density = np.exp(-((positions - wanted) ** 2))
        points[index] = rng.choice(len(positions), size=points.shape[1], p=density / density.sum())
    return points


def band_points(space: SearchSpace, bits: float, width: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count, n_variables], no two alike, from `bits` − `width` to `bits` bits per weight.

    Each begins as a mix of formats of its own (`random_points`); then variables at random go a format down or up until
    the size fits. Raises AmqError for a size that the space does not reach, and where too few points are found.
    """
    check_bits(bits, space)
    found: dict[bytes, np.ndarray] = {}
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        point = random_points(space, 1, rng)[0].astype(np.int64)
        if _step_into(space, point, bits - width, bits, rng):
            found[point.tobytes()] = point
    if len(found) < count:
        raise AmqError(
            f"{len(found)} of {count} different configurations were found from {bits - width:g} to {bits:g} bits per "
            "weight: give a larger --width or fewer of them"
        )
    return np.array(list(found.values()))


def _step_into(space: SearchSpace, point: np.ndarray, low: float, high: float, rng: np.random.Generator) -> bool:
    """Whether `point`, which is changed, could be brought between `low` and `high` bits per weight."""
    for _ in range(ROUNDS * len(point)):
        size = float(space.bits(point))
        if low - 1e-9 <= size <= high + 1e-9:
            return True
        step = 1 if size < low else -1
        movable = np.flatnonzero((point + step >= 0) & (point + step < space.counts))
        if not len(movable):
            return False
        point[rng.choice(movable)] += step
    return False
