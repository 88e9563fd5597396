"""Exact selection against brute force and against the integer program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.search.knapsack import select, select_exact


def instance(seed: int, n: int, m: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 400, (n, m)), axis=1) + np.arange(m)
    costs = np.sort(rng.lognormal(0, 1.5, (n, m)), axis=1)[:, ::-1]
    return costs, sizes


def total(table: np.ndarray, point: np.ndarray) -> float:
    return table[np.arange(len(table)), point].sum()


@hypothesis_settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_exact_equals_brute_force(seed, share):
    costs, sizes = instance(seed, 5)
    low, high = sizes.min(1).sum(), sizes.max(1).sum()
    capacity = int(low + share * (high - low))  # sizes are whole bytes
    best = min(
        total(costs, np.array(p))
        for p in itertools.product(range(3), repeat=5)
        if total(sizes, np.array(p)) <= capacity
    )
    exact = select_exact(costs, sizes, capacity)
    assert total(sizes, exact) <= capacity + 1e-6
    assert total(costs, exact) == pytest.approx(best, rel=1e-6)
    fast = select(costs, sizes, capacity)
    assert total(sizes, fast) <= capacity
    assert total(costs, fast) >= best * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_lagrangian_is_close_to_the_integer_program_at_model_size(seed, share):
    costs, sizes = instance(seed, 210, 4)
    capacity = sizes.min(1).sum() + share * np.ptp([sizes.min(1).sum(), sizes.max(1).sum()])
    fast, exact = select(costs, sizes, capacity), select_exact(costs, sizes, capacity)
    assert total(sizes, fast) <= capacity
    assert total(costs, fast) <= 1.0015 * total(costs, exact)


def test_ends_of_the_range_and_below_it():
    costs, sizes = instance(0, 10)
    assert (select(costs, sizes, sizes.min(1).sum()) == 0).all()
    assert (select(costs, sizes, sizes.max(1).sum()) == 2).all()
    for solver in (select, select_exact):
        with pytest.raises(AmqError, match="below the smallest"):
            solver(costs, sizes, sizes.min(1).sum() - 1)


def test_a_wider_format_that_costs_more_is_never_bought():
    costs = np.array([[1.0, 2.0, 0.5]])  # the middle format is worse than the cheapest
    sizes = np.array([[10, 20, 30]])
    assert select(costs, sizes, 25)[0] == 0
    assert select(costs, sizes, 30)[0] == 2


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_that_is_not_there_is_never_taken(seed):
    costs, sizes = instance(seed, 6, 4)
    costs[:5, 3] = np.inf  # only the last variable has a fourth choice
    allowed = [range(3)] * 5 + [range(4)]
    low, high = sizes.min(1).sum(), np.append(sizes[:5, 2], sizes[5, 3]).sum()
    capacity = int(low + 0.6 * (high - low))
    fits = [p for p in itertools.product(*allowed) if total(sizes, np.array(p)) <= capacity]
    best = min(total(costs, np.array(p)) for p in fits)
    for point in (select(costs, sizes, capacity), select_exact(costs, sizes, capacity)):
        assert np.isfinite(total(costs, point)) and total(sizes, point) <= capacity
    assert total(costs, point) == pytest.approx(best, rel=1e-6)
    assert (select(costs, sizes, sizes.max(1).sum()) == costs.argmin(1)).all()
    costs[0, 0], sizes[0, 0] = np.inf, 0  # nor where it would be the smallest
    assert select(costs, sizes, sizes.max(1).sum())[0] > 0


def test_thousands_of_variables_take_a_moment():
    costs, sizes = instance(0, 18_000)
    capacity = (sizes.min(1).sum() + sizes.max(1).sum()) / 2
    point = select(costs, sizes, capacity)
    assert 0.9999 * capacity < total(sizes, point) <= capacity
