"""The default solver: an additive cost table, exact selection, and true evaluation of the front only.

1. A cost table (linear × format): Fisher scores, measured sensitivities, or plain weight errors.
2. For each of `points` budgets over the reachable range (the uniform formats' costs among them), and for the wanted
   budget, the knapsack optimum.
3. True evaluation of those, and a two-parameter fit from summed cost to loss for everything in between.
4. `refine` more evaluations by moves around the wanted budget (see `refine.py`), by default only where that is so small
   that costs do not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from amq.search.knapsack import select, select_exact
from amq.search.problem import Problem
from amq.search.refine import AUTO_BITS, AUTO_EVALUATIONS, refine
from amq.search.sensitivity import measure
from amq.search.solvers.base import Solution, uniform_configurations
from amq.search.space import SearchSpace

if TYPE_CHECKING:
    from amq.search.settings import SearchSettings

BISECTIONS = 5


def solve(problem: Problem, options: SearchSettings) -> Solution:
    space = problem.space
    problem.evaluate(space.uniform(space.formats[-1]), "uniform")
    table = problem.cost_table(options.cost)
    costs = space.variable_costs(table)
    choose = select_exact if options.exact else select

    def configuration(bits: float) -> dict[str, str]:
        return space.decode(choose(costs, space.sizes, space.capacity(bits)))

    def at_budget(bits: float) -> dict[str, str]:
        if problem.speed is None:
            return configuration(bits)
        return space.decode(problem.select(costs, space.capacity(bits)))

    wanted = [(formats, "uniform") for formats in uniform_configurations(space)]
    if problem.budget is not None:
        wanted.append((at_budget(problem.budget), "budget"))
    low, high = space.front_range
    wanted += [(configuration(bits), "front") for bits in front_budgets(space, options.points)]
    problem.evaluate_many(wanted)
    if problem.max_loss is not None:
        _bisect(problem, problem.max_loss, configuration)
    budget = problem.budget if problem.budget is not None else (low + high) / 2
    _refine(problem, options, costs, at_budget(budget), budget)
    if options.cost != "sensitivity":
        return Solution(table=table)
    measured = measure(problem, options.prune)  # every loss is in the archive already; this solver pins nothing
    return Solution(table=table, sensitivity=replace(measured, pinned=()))


def front_budgets(space: SearchSpace, points: int) -> list[float]:
    """`points` budgets evenly spaced inside the range, each moved to a uniform format's cost where that is nearest.

    So the front has a point at the cost of every uniform configuration, and whether it beats it is measured.
    """
    low, high = space.front_range
    budgets = np.linspace(low, high, points + 2)[1:-1]
    for fmt in space.formats[1:-1] if points else ():
        cost = space.bits_of(space.uniform(fmt))
        if low < cost < high:
            budgets[np.abs(budgets - cost).argmin()] = cost
    return [float(b) for b in budgets]


def _refine(problem: Problem, options: SearchSettings, costs: np.ndarray, start: dict[str, str], budget: float) -> None:
    """By as many evaluations as `--refine` says, or as are worth it from `start`, the knapsack's choice."""
    evaluations = options.refine
    if evaluations is None:
        bits = problem.space.bits_of_linears(start)
        evaluations = AUTO_EVALUATIONS if problem.budget is not None and bits < AUTO_BITS else 0
        if evaluations:
            problem.progress.say(
                f"plan: the linears get {bits:.3f} bits per weight, where costs do not add up: {evaluations} more "
                "evaluations, and those on held-out windows of what gains (--refine 0: none)"
            )
    if evaluations:
        with problem.progress.stage("refine", evaluations) as step:
            before, problem.step = problem.step, step
            refine(problem, costs, start, budget, evaluations)
            problem.step = before


def _bisect(problem: Problem, max_loss: float, configuration: Callable[[float], dict[str, str]]) -> None:
    """Narrows down the smallest budget that meets `max_loss` by true evaluations between its neighbours."""
    for _ in range(BISECTIONS):
        records = problem.archive.evaluated()
        good = [r.bits_per_weight for r in records if r.ranked <= max_loss]
        bad = [r.bits_per_weight for r in records if r.ranked > max_loss]
        if not good:
            return
        upper = min(good)
        lower = max((b for b in bad if b < upper), default=None)
        if lower is None or upper - lower < 0.02:
            return
        problem.evaluate(configuration((lower + upper) / 2), "budget")
