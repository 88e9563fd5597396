"""Random search in the pruned space: the baseline of baselines. Spends as many evaluations as `paper` would."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amq.search.problem import Problem
from amq.search.solvers.base import Solution, evaluate_uniform, pruned, random_points

if TYPE_CHECKING:
    from amq.search.settings import SearchSettings


def solve(problem: Problem, options: SearchSettings) -> Solution:
    evaluate_uniform(problem)
    space, sensitivity = pruned(problem, options.prune)
    count = options.initial + options.iterations * options.per_iteration
    points = random_points(space, count, problem.rng(1))
    problem.evaluate_many([(space.decode(point), "initial") for point in points])
    return Solution(sensitivity=sensitivity)
