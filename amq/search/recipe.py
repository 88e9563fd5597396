"""A rule by position, which measures nothing: values and the way out of the MLP get more, and so do the outer blocks.

llama.cpp's K-quant mixtures give `attn_v` and `ffn_down` of some blocks a wider type; LieQ and others give more to the
first and last blocks. Here: the widest format that everything can have within the budget; then one format up for v and
down projections, and one for the first and last block (both count: two for a v projection there), those with the most
steps first and the smaller ones before the larger; what is left goes to the others by rising size, one format each.
"""

from __future__ import annotations

import re

import numpy as np

from amq.errors import AmqError
from amq.search.space import SearchSpace, is_outer

HEAVY = re.compile(r"(v|down)(_.*)?|fc2|w2")
"""The last part of a role: names that models give to values and to the MLP's way out. A fused qkv is none."""


def steps_up(space: SearchSpace) -> np.ndarray:
    """How many formats above the others each variable should be, int64 [n_variables]: 0, 1 or 2.

    Raises AmqError where no role has such a name, since the rule would be about blocks alone.
    """
    linears = [None if is_outer(v[0]) else v[0] for v in space.variables]
    heavy = [s is not None and bool(HEAVY.fullmatch(s.role.rpartition(".")[2])) for s in linears]
    if not any(heavy):
        roles = ", ".join(sorted({s.role for s in space.weights}))
        raise AmqError(
            f"the recipe wants linears called v… or down…, this model has {roles}: leave recipe out of --strategies"
        )
    blocks = {s.block for s in linears if s is not None}
    ends = (min(blocks), max(blocks))
    return np.array(heavy, dtype=int) + np.array([s is not None and s.block in ends for s in linears], dtype=int)


def follow(space: SearchSpace, budget: float) -> dict[str, str]:
    """What the rule gives within `budget` bits per weight. Raises AmqError as `steps_up`, and below the smallest."""
    up, capacity, sizes = steps_up(space), space.capacity(budget), space.sizes
    rows, top = np.arange(len(sizes)), space.counts - 1
    levels = [np.minimum(level, top) for level in range(len(space.formats))]
    fitting = [point for point in levels if sizes[rows, point].sum() <= capacity]
    if not fitting:
        raise AmqError("the budget is below the smallest configuration")
    point = fitting[-1].copy()
    spare = capacity - float(sizes[rows, point].sum())
    raised = np.zeros(len(point), dtype=int)
    by_size = np.lexsort((rows, sizes[rows, point]))
    wanted = [v for steps in (2, 1) for v in by_size if up[v] >= steps]
    for variable in [*wanted, *(v for v in by_size if not up[v])]:
        extra = float(sizes[variable, min(point[variable] + 1, top[variable])] - sizes[variable, point[variable]])
        if raised[variable] < max(up[variable], 1) and 0 < extra <= spare:
            point[variable] += 1
            raised[variable] += 1
            spare -= extra
    return space.decode(point)
