"""The knapsack over blocks of rows: each block of a linear is a variable of its own, what has no blocks stays one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from amq.errors import AmqError
from amq.search.knapsack import select
from amq.search.space import SearchSpace, is_outer

Chosen = tuple[str, "int | None", str]
"""(weight, number of its block or None for all of it, format)."""


def check_rows(space: SearchSpace) -> None:
    """Raises AmqError where linears share a format: they have no rows of their own."""
    tied = next((v for v in space.variables if len(v) > 1), None)
    if tied is not None:
        raise AmqError(
            f"blocks of rows want linears that choose alone, {tied[0].name} shares its format with {len(tied) - 1} "
            "more: leave the strategy out"
        )


def select_rows(
    space: SearchSpace,
    whole: np.ndarray,
    costs: Mapping[str, Mapping[str, Sequence[float]]],
    rows: Mapping[str, Sequence[int]],
    capacity: float,
) -> tuple[list[Chosen], int]:
    """(the chosen format of every block, in the model's order; bytes that all of them take).

    whole: float64 [n_variables, n_formats], of which those of head and embeddings count. costs: {linear: {format: of
    each block}}; rows: {linear: how many each block has}. capacity: bytes. A block of n rows of N takes n/N of its
    linear's bytes, rounded down. Raises AmqError as `check_rows`, and where nothing fits.
    """
    check_rows(space)
    all_costs, all_sizes, owners = [], [], []
    for index, ((spec, *_), choices) in enumerate(zip(space.variables, space.choices, strict=True)):
        parts = [None] if is_outer(spec) else list(range(len(rows[spec.name])))
        for part in parts:
            row, size = whole[index], space.sizes[index]
            if part is not None:
                row = np.full_like(row, np.inf)
                row[: len(choices)] = [costs[spec.name][fmt.name][part] for fmt in choices]
                size = size * rows[spec.name][part] // spec.out_features
            all_costs.append(row)
            all_sizes.append(size)
            owners.append((spec.name, part, choices))
    sizes = np.array(all_sizes)
    point = select(np.array(all_costs), sizes, capacity)
    chosen = [(name, part, choices[i].name) for (name, part, choices), i in zip(owners, point, strict=True)]
    return chosen, int(sizes[np.arange(len(point)), point].sum())
