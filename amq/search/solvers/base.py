"""What solvers share: their options, their result, and random points of a space."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from amq.search.problem import Problem, Table
from amq.search.sensitivity import Sensitivity, measure
from amq.search.space import SearchSpace


@dataclass(frozen=True)
class Solution:
    """What a solver leaves besides the archive: the cost table it used, or the sensitivities it measured."""

    table: Table | None = None
    sensitivity: Sensitivity | None = None


def uniform_configurations(space: SearchSpace) -> list[dict[str, str]]:
    """The baselines, highest format first: it is the trial evaluation and the base of sensitivities."""
    return [space.uniform(fmt) for fmt in reversed(space.formats)]


def evaluate_uniform(problem: Problem) -> None:
    problem.evaluate_many([(formats, "uniform") for formats in uniform_configurations(problem.space)])


def pruned(problem: Problem, threshold: float) -> tuple[SearchSpace, Sensitivity]:
    """The space with over-sensitive weights pinned to their last choice (the paper's pruning).

    What is tied was measured together, and is pinned together.
    """
    found = measure(problem, threshold)
    space = problem.space
    out = space.widest(found.pinned)
    if len(out) == sum(len(v) for v in space.variables):
        return space, found
    variables = tuple(v for v in space.variables if v[0].name not in out)
    return replace(space, pinned={**space.pinned, **dict(sorted(out.items()))}, variables=variables), found


def random_points(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, n_variables]; each point draws its own mix of formats first: sizes spread over the whole range.

    Variables that have as many choices share a mix.
    """
    points = np.empty((count, len(space.variables)), dtype=int)
    for choices in sorted(set(space.counts.tolist())):
        mine = np.flatnonzero(space.counts == choices)
        mixes = rng.dirichlet(np.ones(choices), size=count)
        points[:, mine] = [rng.choice(choices, size=len(mine), p=mix) for mix in mixes]
    return points
