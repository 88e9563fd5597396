"""Solvers: each spends true evaluations on a `Problem`; what it found is in the problem's archive.

A solver is one file with `solve(problem, options) -> Solution`; adding one is that file and a line here. It must be a
function of its arguments and of losses alone (randomness from `problem.rng`): that makes resuming exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amq.errors import AmqError
from amq.search.problem import Problem
from amq.search.solvers import additive, paper, random
from amq.search.solvers.base import Solution

if TYPE_CHECKING:
    from amq.search.settings import SearchSettings

Solver = Callable[[Problem, "SearchSettings"], Solution]

SOLVERS: dict[str, Solver] = {"additive": additive.solve, "paper": paper.solve, "random": random.solve}


def get_solver(name: str) -> Solver:
    try:
        return SOLVERS[name]
    except KeyError:
        raise AmqError(f"unknown solver {name!r}: expected one of {', '.join(SOLVERS)}") from None


__all__ = ["SOLVERS", "Solution", "Solver", "get_solver"]
