"""Per-group quantization grids: scale and zero point from a group's weights, and rounding to them.

All functions see weights cut into groups, float32 [rows, n_groups, group_size] (`to_groups`), and grids of float32
[rows, n_groups] whose values are already representable in fp16, so that what is optimised is what is stored. A ragged
last group is filled with zeros of importance zero, which no fit sees; the range of every grid includes zero, which
bounds zero_point to [0, max_code] and keeps it exact in fp16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import KEPT, BitFormat, n_groups
from amq.packing import PARTS, PackedWeight, expand_groups, pack_codes
from amq.quantize.quantizers import ZERO_POINTS

TINY = 2.0**-20
"""The smallest scale: a subnormal fp16 that still has five significant bits."""
LARGEST = 65504.0
"""The largest number of fp16."""
ROWS = 4096
"""Rows of a weight whose scales are looked at together: an embedding is not copied as a whole."""
SHRINKS, REFITS = (1.0, 0.85, 0.7), 3
"""What `fitted_grid` tries a group's range at, and how often it refits each."""
NEGLIGIBLE = 1e-4
"""Share of a linear's energy, in squared scales of groups, whose scales may be lost: a hundredth of its size."""


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[rows, in_features] → float32 [rows, n_groups, group_size], zeros after a ragged last group."""
    rows, in_features = weight.shape
    groups = n_groups(in_features, group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - in_features))
    return padded.view(rows, groups, group_size)


def storable(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a grid to fp16 and returns it as float32."""
    return scale.clamp(min=TINY, max=LARGEST).half().float(), zero_point.half().float()


def group_scales(weight: Tensor, fmt: BitFormat, group_size: int) -> Tensor:
    """The scales that the ranges of `weight` [rows, in_features] ask for, float32 [rows, n_groups], before fp16."""

    def ranges(rows: Tensor) -> Tensor:
        groups = to_groups(rows, group_size)
        return groups.amax(-1).clamp(min=0.0) - groups.amin(-1).clamp(max=0.0)

    return torch.cat([ranges(rows) for rows in weight.detach().split(ROWS)]) / fmt.max_code


def out_of_range(weight: Tensor, fmt: BitFormat, group_size: int) -> bool:
    """Whether fp16 cannot hold the scales of groups that `weight` [rows, in_features] is made of.

    Those of groups that hold next to nothing of it may be lost: what they lose is small beside the rest.
    """
    scales = group_scales(weight, fmt, group_size).double()
    odd = (scales > LARGEST) | (scales < TINY)
    energy = scales.square()
    return float(energy[odd].sum()) > NEGLIGIBLE * float(energy.sum())


def check_scales(name: str, weight: Tensor, fmt: BitFormat, group_size: int) -> None:
    """Refuses the linear `name` where its scales are out of fp16's range."""
    if out_of_range(weight, fmt, group_size):
        raise AmqError(
            f"{name}: its weights reach {float(weight.abs().max()):.1e}, for which {fmt.name} needs scales beyond "
            f"fp16's range (from {TINY:.0e} to {LARGEST:.0e}): keep it with --pin '^{re.escape(name)}$={KEPT.name}'"
        )


def minmax_grid(
    groups: Tensor, fmt: BitFormat, shrink: float = 1.0, zero_points: str = "fractional"
) -> tuple[Tensor, Tensor]:
    """The grid that spans each group's range (and zero), its ends moved towards zero by the factor `shrink`."""
    low = groups.amin(-1).clamp(max=0.0) * shrink
    high = groups.amax(-1).clamp(min=0.0) * shrink
    return range_grid(low, high, fmt, zero_points)


def range_grid(low: Tensor, high: Tensor, fmt: BitFormat, zero_points: str = "fractional") -> tuple[Tensor, Tensor]:
    """The grid from `low` ≤ 0 to `high` ≥ 0, of any equal shapes; `zero_points` as in `ZERO_POINTS`."""
    if zero_points == "symmetric":
        middle = float(symmetric_zero(fmt))
        scale, zero_point = storable(torch.maximum(-low / middle, high / (fmt.max_code - middle)), low)
        return scale, torch.full_like(zero_point, middle)
    scale = (high - low) / fmt.max_code
    scale, _ = storable(scale, scale)
    zero_point = (-low / scale).clamp(0, fmt.max_code)
    return storable(scale, zero_point.round() if zero_points == "integer" else zero_point)


def symmetric_zero(fmt: BitFormat) -> int:
    """The zero point of a symmetric grid, the same for all groups: as many levels below it as above, and one more."""
    return fmt.levels // 2


def check_zero_points(zero_points: str) -> str:
    if zero_points not in ZERO_POINTS:
        raise AmqError(f"zero points must be one of {', '.join(ZERO_POINTS)}, got {zero_points!r}")
    return zero_points


def encode(groups: Tensor, scale: Tensor, zero_point: Tensor, fmt: BitFormat) -> Tensor:
    """Nearest codes as float32, [rows, n_groups, group_size]."""
    codes = groups / scale.unsqueeze(-1)
    return codes.add_(zero_point.unsqueeze(-1)).round_().clamp_(0, fmt.max_code)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(codes − zero_point)·scale."""
    return (codes - zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def fitted_grid(
    groups: Tensor,
    importance: Tensor,
    fmt: BitFormat,
    zero_points: str = "fractional",
    shrinks: tuple[float, ...] = SHRINKS,
    refits: int = REFITS,
) -> tuple[Tensor, Tensor]:
    """The clipped asymmetric grid with the least error Σ importance·(w − ŵ)², per group.

    From each of several shrunken ranges, rounding and a weighted least-squares refit of (scale, offset) alternate; the
    best grid seen is kept. importance: float32 [n_groups, group_size], ≥ 0, the mean square of each input feature.
    """
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best = minmax_grid(groups, fmt, zero_points=zero_points)
    for shrink in shrinks:
        scale, zero_point = minmax_grid(groups, fmt, shrink, zero_points)
        for step in range(refits + 1):
            codes = encode(groups, scale, zero_point, fmt)
            error = decode(codes, scale, zero_point).sub_(groups).square_().mul_(importance).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
            if step < refits:
                new = refit if zero_points == "fractional" else _refit_scale
                scale, zero_point = new(groups, codes, importance, scale, zero_point)
    return best


def _refit_scale(
    groups: Tensor, codes: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares w ≈ scale·(code − zero_point) within each group, zero_point as it is."""
    steps = codes - zero_point.unsqueeze(-1)
    new_scale = (importance * steps * groups).sum(-1) / (importance * steps * steps).sum(-1)
    return storable(torch.where(torch.isfinite(new_scale) & (new_scale > TINY), new_scale, scale), zero_point)


def refit(
    groups: Tensor, codes: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares w ≈ scale·code + offset within each group; a degenerate group keeps its grid. Codes may be any
    numbers, of float32."""
    weighted = importance * codes
    total = importance.sum(-1)
    mean_code = weighted.sum(-1) / total
    mean_weight = (importance * groups).sum(-1) / total
    variance = (weighted * codes).sum(-1) / total - mean_code**2
    covariance = (weighted * groups).sum(-1) / total - mean_code * mean_weight
    new_scale = covariance / variance
    new_zero = mean_code - mean_weight / new_scale
    good = (variance > 1e-6) & (new_scale > TINY) & torch.isfinite(new_zero) & (new_zero.abs() < 1024)
    return storable(torch.where(good, new_scale, scale), torch.where(good, new_zero, zero_point))


def packed(codes: Tensor, scale: Tensor, zero_point: Tensor, fmt: BitFormat, group_size: int) -> PackedWeight:
    """codes [rows, in_features], float or uint8, and a grid → PackedWeight."""
    return PackedWeight(
        fmt, codes.shape[1], group_size, pack_codes(codes.to(torch.uint8), fmt), scale.half(), zero_point.half()
    )


def stacked(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The rows of all `parts`, at least one, of one format and width."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tensors = (torch.cat([getattr(part, name) for part in parts]) for name in PARTS)
    return PackedWeight(first.format, first.in_features, first.group_size, *tensors, rotation=first.rotation)


def expand(grid: tuple[Tensor, Tensor], group_size: int, in_features: int) -> tuple[Tensor, Tensor]:
    """A grid at every input feature: two of [rows, in_features]."""
    return expand_groups(grid[0], group_size, in_features), expand_groups(grid[1], group_size, in_features)
