"""Quantizers: weight (and statistics of its inputs) → PackedWeight, as pure functions; one file each."""

from __future__ import annotations

from collections.abc import Callable

from amq.errors import AmqError
from amq.packing import PackedWeight
from amq.quantize.quantizers import clip, gptq, hqq, rtn

Quantizer = Callable[..., list[dict[str, PackedWeight]]]
"""quantize(weights, formats, group_size, gram, zero_points="fractional") -> one {format name: PackedWeight} per weight.

weights: the linears that share one input, [out_features_i, in_features] each, any float dtype.
gram: float32 [in_features, in_features], the mean of x xᵀ over calibration tokens, or None where `NEEDS_GRAM` is False.
zero_points: one of `amq.quantize.quantizers.grid.ZERO_POINTS`.
"""

QUANTIZERS: dict[str, Quantizer] = {
    "gptq": gptq.quantize,
    "clip": clip.quantize,
    "hqq": hqq.quantize,
    "rtn": rtn.quantize,
}
NEEDS_GRAM = frozenset({"gptq", "clip"})


def get_quantizer(name: str) -> Quantizer:
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise AmqError(f"unknown quantizer {name!r}: expected one of {', '.join(QUANTIZERS)}") from None
