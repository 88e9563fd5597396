"""Round to nearest on each group's own range: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amq.formats import BitFormat
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import encode, minmax_grid, packed, to_groups


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None = None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`; `gram` is not used."""
    return [{fmt.name: _one(weight, fmt, group_size, zero_points) for fmt in formats} for weight in weights]


def _one(weight: Tensor, fmt: BitFormat, group_size: int, zero_points: str) -> PackedWeight:
    groups = to_groups(weight, group_size)
    scale, zero_point = minmax_grid(groups, fmt, zero_points=zero_points)
    codes = encode(groups, scale, zero_point, fmt).flatten(1)[:, : weight.shape[1]]
    return packed(codes, scale, zero_point, fmt, group_size)
