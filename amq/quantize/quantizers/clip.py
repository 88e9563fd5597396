"""Clipped rounding to nearest: every group's range is shrunk, both ends separately, to where it does least harm.

The harm is that to the output on calibration inputs, x·(w − ŵ) squared, within one group; that is AWQ's clipping (Lin
et al., MLSys 2024) made asymmetric. Together with the scales of `amq.quantize.quantizers.awq` it is the method AWQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, n_groups
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import decode, encode, packed, range_grid, stacked, to_groups
from amq.util.threads import each

SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52)
"""What each end of a group's range is tried at."""
ROWS, ROWS_ON_GPU = 512, 4096
"""Rows worked on at once: by one thread, and by a GPU."""


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`. gram: float32 [in_features, in_features], the mean of x xᵀ; required."""
    if gram is None:
        raise AmqError("the clip quantizer needs calibration inputs (gram); rtn and hqq do not")
    blocks = diagonal_blocks(gram, group_size)
    return [{fmt.name: _one(weight, fmt, group_size, blocks, zero_points) for fmt in formats} for weight in weights]


def _one(weight: Tensor, fmt: BitFormat, group_size: int, blocks: Tensor, zero_points: str) -> PackedWeight:
    def solve(rows: Tensor) -> PackedWeight:
        groups = to_groups(rows, group_size)
        scale, zero_point = clipped_grid(groups, blocks, fmt, zero_points)
        codes = encode(groups, scale, zero_point, fmt).flatten(1)[:, : rows.shape[1]]
        return packed(codes, scale, zero_point, fmt, group_size)

    step = ROWS if weight.device.type == "cpu" else ROWS_ON_GPU
    return stacked(each(solve, weight.split(step), weight.device))


def diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """[n_groups, group_size, group_size]: the second moments within each group, zeros after a ragged last one."""
    in_features = gram.shape[0]
    groups = n_groups(in_features, group_size)
    padding = groups * group_size - in_features
    padded = torch.nn.functional.pad(gram, (0, padding, 0, padding))
    return padded.view(groups, group_size, groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def clipped_grid(
    groups: Tensor,
    blocks: Tensor,
    fmt: BitFormat,
    zero_points: str = "fractional",
) -> tuple[Tensor, Tensor]:
    """The range of every group, both ends shrunk separately, with the least Σ_t (Σ_k (w − ŵ)[k]·x[t, k])².

    groups: float32 [rows, n_groups, group_size]. blocks: float32 [n_groups, group_size, group_size], E[x xᵀ] within
    each group. Returns scale and zero_point, [rows, n_groups].
    """
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    best_error = torch.full_like(low, torch.inf)
    best = range_grid(low, high, fmt, zero_points)
    alike = zero_points == "symmetric"  # the wider end of a range decides alone
    for low_shrink, high_shrink in zip(SHRINKS, SHRINKS, strict=True) if alike else product(SHRINKS, SHRINKS):
        grid = range_grid(low * low_shrink, high * high_shrink, fmt, zero_points)
        error = decode(encode(groups, *grid, fmt), *grid).sub_(groups)
        moved = torch.bmm(error.transpose(0, 1), blocks).transpose(0, 1)
        cost = (moved * error).sum(-1)
        better = cost < best_error
        best_error = torch.where(better, cost, best_error)
        best = (torch.where(better, grid[0], best[0]), torch.where(better, grid[1], best[1]))
    return best
