"""Weights whose scales fp16 cannot hold: their exponent moves into what makes the linears' input, or they are refused.

A group's scale is stored in fp16. Where the weights of a linear are so small or so large that it does not fit, W·2ᵏ is
quantized and the linears' input is made 2ᵏ times smaller, by scaling what produces it (`amq.quantize.fold`), as AWQ
moves its scales. Powers of two round nothing. A norm before them takes the other side's exponent; where nothing in the
block can, the linear is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import KEPT, BitFormat
from amq.model.calibration import InputGroup
from amq.model.inventory import LinearSpec, get_linear
from amq.quantize.fold import Fold, apply_fold, find_fold
from amq.quantize.quantizers.grid import check_scales, group_scales, out_of_range

LOW, HIGH = 2.0**-14, 2.0**14
"""Where scales are moved to: normal numbers of fp16, with room on both sides."""


def unfit(
    model: nn.Module, linears: Sequence[LinearSpec], formats: Mapping[str, BitFormat], group_size: int
) -> set[str]:
    """Names of `linears`, all of which have a format, whose scales fp16 cannot hold."""
    weights = ((s.name, get_linear(model, s.name).weight) for s in linears)
    return {name for name, weight in weights if out_of_range(weight, formats[name], group_size)}


def move_exponent(
    model: nn.Module,
    block: str,
    group: InputGroup,
    formats: Mapping[str, BitFormat],
    group_size: int,
    head_dim: int | None,
    run: Callable[[], Tensor],
    stored: torch.dtype,
) -> Fold:
    """Moves a power of two from the linears of `group` into the producer of their input, both inside `block`.

    formats: {linear: format}; the group's others are kept, and take the factor too. run, head_dim: as `find_fold` has
    them. stored: the dtype that norms are stored in. Raises AmqError where that cannot be.
    """
    quantized = [s for s in group.linears if s.name in formats]
    largest = [
        float(group_scales(get_linear(model, s.name).weight, formats[s.name], group_size).max()) for s in quantized
    ]
    exponent = _exponent(min(s for s in largest if s > 0), max(largest))
    fold = None if exponent is None else find_fold(model, block, group.linears, head_dim, run)
    if exponent is None or fold is None:
        for spec in quantized:
            check_scales(spec.name, get_linear(model, spec.name).weight, formats[spec.name], group_size)
        raise AmqError(f"{quantized[0].name}: its scales are beyond fp16's range; keep it with --pin REGEX={KEPT.name}")
    factors = apply_fold(model, fold, group.linears, torch.full((int(fold.index.max()) + 1,), 2.0**-exponent), stored)
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise AmqError(
            f"{quantized[0].name}: its scales are beyond fp16's range, and {fold.producer} cannot take their exponent "
            f"in {str(stored).removeprefix('torch.')}: keep it with --pin REGEX={KEPT.name}"
        )
    return fold


def _exponent(low: float, high: float) -> int | None:
    """k for which [low, high]·2ᵏ lies within [LOW, HIGH]; None where it is too wide."""
    if low < LOW:
        exponent = math.ceil(math.log2(LOW / low))
    else:
        exponent = -math.ceil(math.log2(high / HIGH))
    scaled = (low * 2.0**exponent, high * 2.0**exponent)
    return exponent if LOW / 2 <= scaled[0] and scaled[1] <= 2 * HIGH else None
