"""Refinement: local moves around one budget, accepted by true evaluations on two window sets.

A (1+1) evolution strategy in the space of log-costs: the cost table is perturbed by log-normal noise around the centre
that gave the best configuration so far, and the knapsack is solved again. So every move stays on the budget, changes
several linears coherently, and prefers linears whose rank the table leaves open. A move is kept only where the search
windows and, measured afterwards, the held-out confirmation windows both improve.
"""

from __future__ import annotations

import numpy as np

from amq.search.knapsack import select
from amq.search.problem import Problem

SIGMA = 0.35
GROW, SHRINK = 1.3, 0.93
"""Step-size rule: one success in about five keeps sigma where it is."""


def refine(
    problem: Problem, costs: np.ndarray, start: dict[str, str], budget: float, evaluations: int
) -> dict[str, str]:
    """Spends `evaluations` true evaluations; returns the best confirmed configuration.

    costs: [n_variables, n_formats]; start: the configuration to improve, within `budget` bits per weight.
    """
    space = problem.space
    capacity = space.capacity(budget)
    best = start
    loss = problem.evaluate(best, "budget").ranked
    confirmed = problem.evaluate(best, "budget", windows="confirm").ranked
    centre = np.zeros(len(costs))
    sigma = SIGMA
    for index in range(evaluations):
        rng = problem.rng(2, index)
        offset = centre + sigma * rng.standard_normal(len(costs))
        candidate = space.decode(select(costs * np.exp(offset)[:, None], space.sizes, capacity))
        if candidate == best:
            sigma *= GROW
            continue
        new = problem.evaluate(candidate, "refine", iteration=index).ranked
        if new < loss:
            check = problem.evaluate(candidate, "refine", windows="confirm", iteration=index).ranked
            if check < confirmed:
                best, loss, confirmed, centre = candidate, new, check, offset
                sigma *= GROW
                continue
        sigma *= SHRINK
    return best
