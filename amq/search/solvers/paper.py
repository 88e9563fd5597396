"""The paper's search (AMQ, §3; Algorithm 1): prune, sample, then fit a surrogate, evolve on it, evaluate, repeat.

`--preset paper` is its setting to the letter: 250 initial configurations with the uniform ones among them, NSGA-II
with a population of 200 for 20 generations, crossover probability 0.9, mutation probability 0.1 (per variable), 50
candidates per iteration, 200 iterations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amq.search.archive import Record
from amq.search.front import pareto_indices, spread
from amq.search.problem import Problem
from amq.search.records import SurrogateScores
from amq.search.scores import quality
from amq.search.solvers.base import Solution, evaluate_uniform, pruned, random_points
from amq.search.space import SearchSpace
from amq.search.surrogates import SURROGATES, Surrogate

if TYPE_CHECKING:
    from amq.search.settings import SearchSettings


def solve(problem: Problem, options: SearchSettings) -> Solution:
    evaluate_uniform(problem)
    space, sensitivity = pruned(problem, options.prune)
    uniform = np.stack([space.encode(space.uniform(fmt)) for fmt in space.formats])
    draws = random_points(space, max(0, options.initial - len(uniform)), problem.rng(1))
    data = _Data(space)
    points = np.concatenate([uniform, draws])
    for point, record in zip(
        points, problem.evaluate_many([(space.decode(p), "initial") for p in points]), strict=True
    ):
        data.add(point, record)
    for iteration in range(options.iterations):
        surrogate = SURROGATES[options.surrogate](problem.seed)
        surrogate.fit(data.x, data.y)
        chosen = _candidates(problem, space, surrogate, data, options, iteration)
        if not len(chosen):
            problem.progress.say(f"iteration {iteration}: the surrogate proposes nothing new; the search has converged")
            break
        predicted = surrogate.predict(chosen)
        records = problem.evaluate_many([(space.decode(p), "iteration") for p in chosen], iteration=iteration)
        losses = [data.add(point, record) for point, record in zip(chosen, records, strict=True)]
        _log_quality(problem, options.surrogate, iteration, len(data.y), np.array(losses, dtype=float), predicted)
    return Solution(sensitivity=sensitivity)


class _Data:
    """Feasible evaluations as arrays: x int [n, variables], y float [n]."""

    def __init__(self, space: SearchSpace) -> None:
        self.x = np.empty((0, len(space.variables)), dtype=int)
        self.y = np.empty(0)
        self.seen: set[bytes] = set()

    def add(self, point: np.ndarray, record: Record) -> float:
        self.seen.add(point.astype(np.int8).tobytes())
        if record.loss is None:
            return np.nan
        self.x = np.vstack([self.x, point])
        self.y = np.append(self.y, record.loss)
        return record.loss


def _candidates(
    problem: Problem, space: SearchSpace, surrogate: Surrogate, data: _Data, options: SearchSettings, iteration: int
) -> np.ndarray:
    """New points [≤ per_iteration, variables] on the surrogate's front, spread along bits per weight."""
    population = _evolve(problem, space, surrogate, data, options, iteration)
    new = np.array([p for p in population if p.astype(np.int8).tobytes() not in data.seen], dtype=int)
    if not len(new):
        return new
    bits, predicted = space.bits(new), surrogate.predict(new)
    chosen: list[int] = []
    left = np.arange(len(new))
    anchors = list(space.bits(data.x[pareto_indices(np.column_stack([space.bits(data.x), data.y]))]))
    while len(chosen) < options.per_iteration and len(left):  # the front first, then the front of what is left
        front = left[pareto_indices(np.column_stack([bits[left], predicted[left]]))]
        taken = front[spread(bits[front], anchors, options.per_iteration - len(chosen))]
        chosen.extend(taken)
        anchors.extend(bits[taken])
        left = np.setdiff1d(left, front)
    return new[chosen]


def _evolve(
    problem: Problem, space: SearchSpace, surrogate: Surrogate, data: _Data, options: SearchSettings, iteration: int
) -> np.ndarray:
    """NSGA-II (pymoo) on (bits per weight, predicted loss), started from the archive's front.

    Returns [population, variables].
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.pntx import TwoPointCrossover
    from pymoo.optimize import minimize

    rng = problem.rng(3, iteration)
    top = space.largest

    class Surrogated(PymooProblem):
        def __init__(self) -> None:
            super().__init__(n_var=len(space.variables), n_obj=2, xl=0, xu=top, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict, *args: object, **kwargs: object) -> None:
            x = x.astype(int)
            out["F"] = np.column_stack([space.bits(x), surrogate.predict(x)])

    class Redraw(Mutation):
        """Each variable takes a random format with the mutation probability."""

        def _do(self, problem: PymooProblem, x: np.ndarray, **kwargs: object) -> np.ndarray:
            redrawn = rng.integers(0, space.counts, size=x.shape)
            return np.where(rng.random(x.shape) < options.mutation, redrawn, x)

    front = data.x[pareto_indices(np.column_stack([space.bits(data.x), data.y]))][: options.population]
    start = (
        np.vstack([front, random_points(space, options.population - len(front), rng)])
        if len(front) < options.population
        else front
    )
    algorithm = NSGA2(
        pop_size=options.population,
        sampling=start,
        crossover=TwoPointCrossover(prob=options.crossover),
        mutation=Redraw(prob=1.0),
        eliminate_duplicates=True,
    )
    result = minimize(Surrogated(), algorithm, ("n_gen", options.generations), seed=int(rng.integers(2**31)))
    return result.pop.get("X").astype(int)


def _log_quality(
    problem: Problem, name: str, iteration: int, evaluations: int, true: np.ndarray, predicted: np.ndarray
) -> None:
    """How well the surrogate predicted candidates it had not seen: its held-out quality."""
    use = np.isfinite(true)
    best = problem.best_at(problem.budget)
    problem.surrogate_log.append(SurrogateScores(
        iteration=iteration, evaluations=evaluations, surrogate=name,
        **(quality(true[use], predicted[use]) if use.sum() > 1 else {"rmse": None, "spearman": None, "kendall": None}),
        hypervolume=problem.hypervolume(), best_loss_at_budget=best.loss if best else None,
    ))  # fmt: skip
