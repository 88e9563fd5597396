"""Solvers: each spends true evaluations on a `Problem`; what it found is in the problem's archive.

A solver is one file with `solve(problem, options) -> Solution`; adding one is that file and its name here. It must be a
function of its arguments and of losses alone (randomness from `problem.rng`): that makes resuming exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amq.util.lazy import Registry

if TYPE_CHECKING:
    from amq.search.problem import Problem
    from amq.search.settings import SearchSettings
    from amq.search.solvers.base import Solution

Solver = Callable[["Problem", "SearchSettings"], "Solution"]

SOLVERS: Registry[Solver] = Registry(
    "solver", {name: f"amq.search.solvers.{name}:solve" for name in ("additive", "paper", "random")}
)
