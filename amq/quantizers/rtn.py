"""Round to nearest on each group's own range: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amq.formats import BitFormat
from amq.packing import PackedWeight
from amq.quantizers.grid import encode, minmax_grid, packed, to_groups


def quantize(
    weights: Sequence[Tensor], formats: Sequence[BitFormat], group_size: int, gram: Tensor | None = None
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantizers.Quantizer`; `gram` is not used."""
    return [{fmt.name: _one(weight, fmt, group_size) for fmt in formats} for weight in weights]


def _one(weight: Tensor, fmt: BitFormat, group_size: int) -> PackedWeight:
    groups = to_groups(weight, group_size)
    scale, zero_point = minmax_grid(groups, fmt)
    codes = encode(groups, scale, zero_point, fmt).flatten(1)[:, : weight.shape[1]]
    return packed(codes, scale, zero_point, fmt, group_size)
