"""Level switches, kept where a measurement is better: an evolution of one parent at each budget, without a cost table.

EvoPress (arXiv 2410.14649) searches so: an offspring lowers one weight by a format and raises another, a few times
over, so that it stays on the budget; the best of a generation replaces its parent if it is better. Budgets are worked
off from the smallest on, each from the best of the one before with random weights raised until it is full.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amq.search.archive import Record
from amq.search.problem import Problem
from amq.search.space import SearchSpace

PHASE = "greedy"
OFFSPRING = 4
SWITCHES = 3
"""At most so many in an offspring: the smaller of two even draws from 1 on, as in EvoPress."""


def climb(problem: Problem, budgets: Sequence[float], evaluations: int) -> dict[float, Record]:
    """{budget in bits per weight: the best record}; `evaluations` true ones in all, in equal parts, at least one each.

    Raises AmqError where a budget is below the smallest configuration.
    """
    space, found = problem.space, dict[float, Record]()
    point = space.smallest
    for index, budget in enumerate(sorted(budgets)):
        rng = problem.rng(4, index)
        capacity = space.capacity(budget)
        point = _fill(space, point, capacity, rng)
        best = problem.evaluate(space.decode(point), PHASE, iteration=index)
        left = evaluations // len(budgets) - 1
        while left > 0:
            points = [_switch(space, point, capacity, rng) for _ in range(min(OFFSPRING, left))]
            left -= len(points)
            records = problem.evaluate_many([(space.decode(p), PHASE) for p in points], iteration=index)
            first = min(range(len(records)), key=lambda i: records[i].ranked)
            if records[first].ranked < best.ranked:
                point, best = points[first], records[first]
        found[budget] = best
    return found


def _fill(space: SearchSpace, point: np.ndarray, capacity: float, rng: np.random.Generator) -> np.ndarray:
    """`point` with random variables raised by one format, one after the other, for as long as one fits."""
    sizes, rows, point = space.sizes, np.arange(len(point)), point.copy()
    spare = capacity - float(sizes[rows, point].sum())
    while True:
        above = np.minimum(point + 1, space.counts - 1)
        extra = sizes[rows, above] - sizes[rows, point]
        fits = np.flatnonzero((above > point) & (extra <= spare))
        if not len(fits):
            return point
        variable = rng.choice(fits)
        point[variable] += 1
        spare -= extra[variable]


def _switch(space: SearchSpace, point: np.ndarray, capacity: float, rng: np.random.Generator) -> np.ndarray:
    """An offspring: one to SWITCHES variables lowered by a format, and what that frees given to random others."""
    lowered = point.copy()
    for _ in range(int(rng.integers(1, SWITCHES + 1, 2).min())):
        above = np.flatnonzero(lowered > 0)
        if len(above):
            lowered[rng.choice(above)] -= 1
    return _fill(space, lowered, capacity, rng)
