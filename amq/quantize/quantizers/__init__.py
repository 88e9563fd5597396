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
gram: float32 [in_features, in_features], the mean of x xᵀ over calibration tokens, weighted for those in
    `NEEDS_WEIGHTS`; or None where a quantizer is not in `NEEDS_GRAM`.
zero_points: one of `ZERO_POINTS`.
"""

QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "gptq": "amq.quantize.quantizers.gptq:quantize",
        "guided": "amq.quantize.quantizers.gptq:quantize",
        "two_sided": "amq.quantize.quantizers.two_sided:quantize",
        "clip": "amq.quantize.quantizers.clip:quantize",
        "hqq": "amq.quantize.quantizers.hqq:quantize",
        "rtn": "amq.quantize.quantizers.rtn:quantize",
    },
)
NEEDS_GRAM = frozenset({"gptq", "guided", "two_sided", "clip"})
NEEDS_WEIGHTS = frozenset({"guided", "two_sided"})
"""Their tokens count by `amq.model.token_weights`."""
NEEDS_OUTPUTS = frozenset({"two_sided"})
"""They also take `outputs`, second moments of gradients at each weight's outputs: `amq.model.token_weights` again."""
ZERO_POINTS = ("fractional", "integer", "symmetric")
"""What a zero point may be: any fp16 number; a whole code; levels // 2 everywhere. Other tools' formats need the last
two."""
