"""Exact selection: one format per variable, the least total cost within a byte budget.

`select` walks the Lagrangian: the lower convex hulls of all variables' (size, cost) points give one list of upgrades,
sorted by cost saved per byte; every prefix of it is optimal for its own size. The first upgrade that does not fit is
where the integer problem begins, and `_fill` spends what is left. `select_exact` is the integer program itself
(HiGHS), used as the check and with `--exact`.
"""

from __future__ import annotations

import numpy as np

from amq.errors import AmqError


def select(costs: np.ndarray, sizes: np.ndarray, capacity: float, *, pairs: bool = True) -> np.ndarray:
    """Indices [n_variables] of the chosen formats.

    costs: float64 [n_variables, n_formats]. sizes: int64, same shape, bytes, rising along the formats.
    capacity: bytes. pairs: look for pairs of changes in the end, too, whose number grows with the square of the
        variables; where costs are convex in size and sizes alike they gain next to nothing.
    Raises AmqError when even the smallest choice does not fit.
    """
    smallest = sizes.argmin(axis=1)
    rows = np.arange(len(sizes))
    if sizes[rows, smallest].sum() > capacity:
        raise AmqError("the budget is below the smallest configuration")
    point = smallest.copy()
    used = sizes[rows, point].sum()
    for _, variable, target in _upgrades(costs, sizes):
        extra = sizes[variable, target] - sizes[variable, point[variable]]
        if used + extra <= capacity:
            point[variable] = target
            used += extra
    return _fill(costs, sizes, point, capacity - used, pairs)


def _upgrades(costs: np.ndarray, sizes: np.ndarray) -> list[tuple[float, int, int]]:
    """(−saving per byte, variable, format) along each variable's lower hull, best first."""
    steps = []
    for variable, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        at = int(size.argmin())
        while True:
            larger = np.flatnonzero((size > size[at]) & (cost < cost[at]))
            if not len(larger):
                break
            rate = (cost[at] - cost[larger]) / (size[larger] - size[at])
            at = int(larger[rate.argmax()])
            steps.append((-float(rate.max()), variable, at))
    return sorted(steps)


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
    """The two changes, of different variables, that save most together within `spare` bytes; None if none saves."""
    up = np.argwhere((gain > 0) & (extra > spare))
    down = np.argwhere((extra < 0) & (gain <= 0))
    if not len(up) or not len(down):
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
    # HiGHS stops at an absolute gap of 1e-6, which scipy cannot set: costs are scaled up until that is nothing
    scale = 1e-4 * float(np.abs(costs).max()) or 1.0
    result = milp(
        costs.ravel() / scale,
        integrality=np.ones(n * m),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choose_one, 1, 1),
            LinearConstraint(sizes.reshape(1, -1) / unit, ub=capacity / unit),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    if result.x is None:
        raise AmqError(f"the budget is below the smallest configuration (integer program: {result.message})")
    return result.x.reshape(n, m).argmax(axis=1)
