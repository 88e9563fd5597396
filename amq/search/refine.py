"""Refinement: moves around one budget, accepted by true evaluations on two window sets.

A (1+1) evolution strategy in the space of log-costs: the cost table is perturbed by log-normal noise around the centre
that gave the best configuration so far, and the knapsack is solved again. So every move stays on the budget, changes
several linears coherently, and prefers linears whose rank the table leaves open. What a table gets wrong it gets wrong
for a role or a block as a whole (terms between linears, saturation), so that the noise of a variable has three parts:
its own, its role's and its block's.

A move is kept only where the search windows and, measured afterwards, the held-out confirmation windows both improve.
So of all that was measured on both, what was kept last is the best on the held-out windows, as `choose` knows.
"""

from __future__ import annotations

import numpy as np

from amq.search.problem import Problem
from amq.search.space import SearchSpace

PHASE = "refine"
AUTO_EVALUATIONS, AUTO_BITS = 40, 2.7
"""What `--refine` does by default: so many evaluations where the linears of the blocks get less than so many bits."""
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
    parts = _parts(space)
    centre = np.zeros(len(costs))
    sigma = SIGMA
    for index in range(evaluations):
        rng = problem.rng(2, index)
        noise = np.sum([rng.standard_normal(part.max() + 1)[part] for part in parts], axis=0)
        offset = centre + sigma * noise / np.sqrt(len(parts))
        candidate = space.decode(problem.select(costs * np.exp(offset)[:, None], capacity))
        if candidate == best:
            sigma *= GROW
            continue
        new = problem.evaluate(candidate, PHASE, iteration=index).ranked
        if new < loss:
            check = problem.evaluate(candidate, PHASE, windows="confirm", iteration=index).ranked
            if check < confirmed:
                best, loss, confirmed, centre = candidate, new, check, offset
                sigma *= GROW
                continue
        sigma *= SHRINK
    return best


def _parts(space: SearchSpace) -> list[np.ndarray]:
    """Which draw each variable takes of every part of the noise, int64 [n_variables] each."""
    keys = [(v[0].name, v[0].role, v[0].block) for v in space.variables]
    return [np.unique(np.array(of), return_inverse=True)[1] for of in zip(*keys, strict=True)]
