"""Exact selection: one format per variable, the least total cost within a byte budget.

`select` walks the Lagrangian: the lower convex hulls of all variables' (size, cost) points give one list of upgrades,
sorted by cost saved per byte; every prefix of it is optimal for its own size. The first upgrade that does not fit is
where the integer problem begins, and `_fill` spends what is left. `select_exact` is the integer program itself
(HiGHS), used as the check and with `--exact`.
"""

from __future__ import annotations

import numpy as np

from amq.errors import AmqError

GROWTH, BISECTIONS = 24, 30
"""Steps of `select_in_time`: to a price of time at which nothing else counts, and between that and none."""
MOST_PAIRS = 1 << 22
"""Pairs of changes that are looked through. With more variables than have as many, the greedy choice is closer to the
optimum than a pair could bring it: what it leaves of the budget is less than one change of thousands."""


def select(costs: np.ndarray, sizes: np.ndarray, capacity: float, *, pairs: bool = True) -> np.ndarray:
    """Indices [n_variables] of the chosen formats.

    costs: float64 [n_variables, n_formats]; infinite where a variable has no such choice.
    sizes: int64, same shape, bytes, rising along the formats.
    capacity: bytes. pairs: look for pairs of changes in the end, too, whose number grows with the square of the
        variables; where costs are convex in size and sizes alike they gain next to nothing.
    Raises AmqError when even the smallest choice does not fit.
    """
    rows = np.arange(len(sizes))
    start = _smallest(costs, sizes)
    used = int(sizes[rows, start].sum())
    if used > capacity:
        raise AmqError("the budget is below the smallest configuration")
    point, table = start.tolist(), sizes.tolist()
    for variable, target in _upgrades(costs, sizes, start):
        row = table[variable]
        extra = row[target] - row[point[variable]]
        if used + extra <= capacity:
            point[variable] = target
            used += extra
    return _fill(costs, sizes, np.array(point), capacity - used, pairs)


def select_in_time(
    costs: np.ndarray, sizes: np.ndarray, capacity: float, times: np.ndarray, most: float
) -> np.ndarray | None:
    """As `select`, of the choices that take `most` seconds together or less; None where there are none.

    times: float64, same shape as costs, seconds. The second bound has a multiplier λ, by bisection the least with
    which `select` on costs + λ · times keeps it: what lies off the convex hull of (cost, time) is not found.
    """
    rows = np.arange(len(sizes))

    def at(price: float) -> tuple[np.ndarray, float]:
        point = select(costs + price * times, sizes, capacity)
        return point, float(times[rows, point].sum())

    point, seconds = at(0.0)
    if seconds <= most:
        return point
    low, high = 0.0, price_of_time(costs, times) or 1.0
    for _ in range(GROWTH):
        point, seconds = at(high)
        if seconds <= most:
            break
        low, high = high, high * 4
    else:
        return None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found, seconds = at(middle)
        if seconds <= most:
            point, high = found, middle
        else:
            low = middle
    return point


def price_of_time(costs: np.ndarray, times: np.ndarray) -> float:
    """About where neither cost nor time outweighs the other: the ratio of their ranges."""
    return float(np.ptp(costs[np.isfinite(costs)])) / max(float(np.ptp(times)), 1e-12)


def _smallest(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The smallest choice of every variable, int64 [n_variables]."""
    return np.where(np.isinf(costs), np.iinfo(sizes.dtype).max, sizes).argmin(axis=1)


def _upgrades(costs: np.ndarray, sizes: np.ndarray, start: np.ndarray) -> list[tuple[int, int]]:
    """(variable, format) along each variable's lower hull from `start` on, the most cost saved per byte first."""
    rows, at = np.arange(len(sizes)), start
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(rows):
        saved, more = costs[rows, at][:, None] - costs[rows], sizes[rows] - sizes[rows, at][:, None]
        better = (more > 0) & (saved > 0)
        rate = np.where(better, saved, -np.inf) / np.where(better, more, 1)
        on = better.any(axis=1)
        rows, at, rate = rows[on], rate[on].argmax(axis=1), rate[on].max(axis=1)
        steps.append((-rate, rows, at))
    negated, variable, target = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.lexsort((target, variable, negated))
    return list(zip(variable[order].tolist(), target[order].tolist(), strict=True))


def _fill(costs: np.ndarray, sizes: np.ndarray, point: np.ndarray, spare: float, pairs: bool) -> np.ndarray:
    """Improves a point by single changes and by pairs (one up, one down) for as long as they save cost and fit."""
    rows = np.arange(len(sizes))
    point = point.copy()
    while True:
        gain = costs[rows, point][:, None] - costs
        extra = sizes - sizes[rows, point][:, None]
        single = np.where(extra <= spare, gain, -np.inf)
        best = np.unravel_index(single.argmax(), single.shape)
        if single[best] > 0:
            spare -= extra[best]
            point[best[0]] = best[1]
            continue
        pair = _best_pair(gain, extra, spare) if pairs else None
        if pair is None:
            return point
        for variable, fmt in pair:
            spare -= extra[variable, fmt]
            point[variable] = fmt


def _best_pair(gain: np.ndarray, extra: np.ndarray, spare: float) -> list[tuple[int, int]] | None:
    """The two changes, of different variables, that save most together within `spare` bytes; None if none saves, or
    where there are more than `MOST_PAIRS`."""
    up = np.argwhere((gain > 0) & (extra > spare))
    down = np.argwhere((extra < 0) & (gain <= 0))
    if not 0 < len(up) * len(down) <= MOST_PAIRS:
        return None
    up_gain, up_extra = gain[up[:, 0], up[:, 1]], extra[up[:, 0], up[:, 1]]
    down_gain, down_extra = gain[down[:, 0], down[:, 1]], extra[down[:, 0], down[:, 1]]
    total = up_gain[:, None] + down_gain[None]
    fits = (up_extra[:, None] + down_extra[None] <= spare) & (up[:, 0][:, None] != down[:, 0][None])
    total = np.where(fits, total, -np.inf)
    i, j = np.unravel_index(total.argmax(), total.shape)
    if total[i, j] <= 1e-15:
        return None
    return [(int(up[i, 0]), int(up[i, 1])), (int(down[j, 0]), int(down[j, 1]))]


def select_exact(costs: np.ndarray, sizes: np.ndarray, capacity: float) -> np.ndarray:
    """The same by integer programming; arguments and result as for `select`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n, m = costs.shape
    capacity = np.floor(capacity + 1e-6)  # sizes are whole bytes; the solver's tolerance must not buy the next one
    choose_one = csr_array((np.ones(n * m), (np.repeat(np.arange(n), m), np.arange(n * m))), shape=(n, n * m))
    unit = float(sizes.max())
    allowed = np.isfinite(costs)
    costs = np.where(allowed, costs, 0.0)
    # HiGHS stops at an absolute gap of 1e-6, which scipy cannot set: costs are scaled up until that is nothing
    scale = 1e-4 * float(np.abs(costs).max()) or 1.0
    result = milp(
        costs.ravel() / scale,
        integrality=np.ones(n * m),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(choose_one, 1, 1),
            LinearConstraint(sizes.reshape(1, -1) / unit, ub=capacity / unit),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    if result.x is None:
        raise AmqError(f"the budget is below the smallest configuration (integer program: {result.message})")
    return result.x.reshape(n, m).argmax(axis=1)
