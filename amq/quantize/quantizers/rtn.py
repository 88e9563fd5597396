"""Round to nearest, without data: on each group's own range, or on the grid of least squared error.

The first is the quantizer `rtn`, the baseline. The second costs twelve passes over the weights and is what heads and
embeddings take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amq.formats import BitFormat, check_group_size
from amq.kernels.rounding import GridSearch, quantize_rows
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import (
    REFITS,
    SHRINKS,
    check_zero_points,
    encode,
    fitted_grid,
    packed,
    stacked,
    to_groups,
)

PIECE = 1 << 24
"""Weights that torch rounds at once: it takes some forty bytes for each."""


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None = None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`; `gram` is not used. All weights are on one device."""
    return _round(weights, formats, group_size, zero_points, (1.0,), 0)


def quantize_fitted(
    weights: Sequence[Tensor], formats: Sequence[BitFormat], group_size: int, zero_points: str = "fractional"
) -> list[dict[str, PackedWeight]]:
    """`quantize` on the grid of least squared error, which is fitted to every group."""
    return _round(weights, formats, group_size, zero_points, SHRINKS, REFITS)


def _round(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    zero_points: str,
    shrinks: tuple[float, ...],
    refits: int,
) -> list[dict[str, PackedWeight]]:
    check_group_size(group_size)
    if any(weight.device.type != "cpu" for weight in weights):
        return [
            {fmt.name: in_torch(weight, fmt, group_size, zero_points, shrinks, refits) for fmt in formats}
            for weight in weights
        ]
    check_zero_points(zero_points)
    results: list[dict[str, PackedWeight]] = [{} for _ in weights]
    for width in sorted({weight.shape[1] for weight in weights}):  # weights of a block need not share an input here
        places = [i for i, weight in enumerate(weights) if weight.shape[1] == width]
        search = GridSearch(torch.ones(width), zero_points, shrinks, refits)
        found = quantize_rows([weights[i] for i in places], formats, group_size, search, None)
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return results


def in_torch(
    weight: Tensor, fmt: BitFormat, group_size: int, zero_points: str, shrinks: tuple[float, ...], refits: int
) -> PackedWeight:
    """One weight in plain torch, on its device: what specifies csrc/cpu/quantize_grid.h."""
    importance = to_groups(torch.ones(1, weight.shape[1], device=weight.device), group_size)[0]

    def solve(rows: Tensor) -> PackedWeight:
        groups = to_groups(rows, group_size)
        scale, zero_point = fitted_grid(groups, importance, fmt, zero_points, shrinks, refits)
        codes = encode(groups, scale, zero_point, fmt).flatten(1)[:, : weight.shape[1]]
        return packed(codes, scale, zero_point, fmt, group_size)

    return stacked([solve(rows) for rows in weight.split(max(1, PIECE // max(1, weight.shape[1])))])
