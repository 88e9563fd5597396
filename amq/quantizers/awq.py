"""Activation-aware scales (AWQ: Lin et al., MLSys 2024): factors per input feature that make rounding do less harm.

Important features get larger weights and so a finer grid: W·s is rounded in place of W, and x/s takes x's place, by
changing what makes x (`amq.quantize.fold`). The search is over one number: s = rms(x)^α.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amq.formats import BitFormat
from amq.quantizers.grid import decode, encode, minmax_grid, to_groups

EXPONENTS = tuple(i / 20 for i in range(20))
"""α of the search; 0 leaves the weight alone."""


def search_scale(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor,
    zero_points: str = "fractional",
    tie: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Factors s [in_features] for the linears that share one input, each measured at its own format, and their α.

    weights: [out_features_i, in_features] each; formats: one per weight. gram: float32
    [in_features, in_features], the mean of x xᵀ.
    tie: int64 [in_features], features with equal numbers get equal factors; None: all are free.
    The error is that of the outputs, summed over the weights, ranges unclipped.
    """
    power = gram.diagonal().clamp(min=1e-12)
    power = power if tie is None else _tied(power, tie)
    best, best_error, best_exponent = torch.ones_like(power), math.inf, 0.0
    for exponent in EXPONENTS:
        scale = power.sqrt() ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        error = sum(
            _rounding_error(w.float(), scale, fmt, group_size, gram, zero_points)
            for w, fmt in zip(weights, formats, strict=True)
        )
        if error < best_error:
            best, best_error, best_exponent = scale, error, exponent
    return best, best_exponent


def _tied(power: Tensor, tie: Tensor) -> Tensor:
    sums = torch.zeros(int(tie.max()) + 1).index_add_(0, tie, power)
    return (sums / torch.bincount(tie).clamp(min=1))[tie]


def _rounding_error(
    weight: Tensor, scale: Tensor, fmt: BitFormat, group_size: int, gram: Tensor, zero_points: str
) -> float:
    """Σ_rows (w − ŵ) H (w − ŵ)ᵀ where ŵ·scale is w·scale rounded to nearest."""
    groups = to_groups(weight * scale, group_size)
    grid = minmax_grid(groups, fmt, zero_points=zero_points)
    rounded = decode(encode(groups, *grid, fmt), *grid).flatten(1)[:, : weight.shape[1]]
    error = rounded.div_(scale).sub_(weight)
    return float(((error @ gram) * error).sum())
