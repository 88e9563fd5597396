"""Quantizers: weight (and statistics of its inputs) → PackedWeight, as pure functions; one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amq.util.lazy import Registry

if TYPE_CHECKING:
    from amq.packing import PackedWeight

Quantizer = Callable[..., "list[dict[str, PackedWeight]]"]
"""quantize(weights, formats, group_size, gram, zero_points="fractional") -> one {format name: PackedWeight} per weight.

weights: the linears that share one input, [out_features_i, in_features] each, any float dtype.
gram: float32 [in_features, in_features], the mean of x xᵀ over calibration tokens, or None where `NEEDS_GRAM` is False.
zero_points: one of `ZERO_POINTS`.
"""

QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer", {name: f"amq.quantize.quantizers.{name}:quantize" for name in ("gptq", "clip", "hqq", "rtn")}
)
NEEDS_GRAM = frozenset({"gptq", "clip"})
ZERO_POINTS = ("fractional", "integer", "symmetric")
"""What a zero point may be: any fp16 number; a whole code; levels // 2 everywhere. Other tools' formats need the last
two."""
