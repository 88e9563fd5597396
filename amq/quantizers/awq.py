"""Activation-aware scales (AWQ: Lin et al., MLSys 2024): factors per input feature that make rounding do less harm.

Important features get larger weights and so a finer grid: W·s is rounded in place of W, and x/s takes x's place, by
changing what makes x (`amq.quantize.fold`). The search is over one number: s = rms(x)^α. Each α is judged by what
rounding leaves with ranges clipped as they will be: judged by unclipped or roughly clipped ranges, scales are chosen
that only do what clipping does better (on SmolLM2 at int3 they raised the error of v by a tenth to a sixth). A sample
of the rows is enough for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amq.formats import BitFormat
from amq.quantizers.clip import clipped_grid, diagonal_blocks
from amq.quantizers.grid import decode, encode, to_groups
from amq.threads import parallel_map

EXPONENTS = tuple(i / 16 for i in range(9))
"""α of the search; 0 leaves the weight alone."""
SAMPLE = 256
"""Rows of each weight that the search looks at, evenly spread."""
PIECE = 64
"""Rows that a thread works on at once."""


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
    The error is that of each linear's outputs over their energy, summed: q and k, whose outputs are large, must not
    decide for v.
    """
    power = gram.diagonal().clamp(min=1e-12)
    power = power if tie is None else _tied(power, tie)
    blocks = diagonal_blocks(gram, group_size)
    samples = [w.float()[:: max(1, len(w) // SAMPLE)] for w in weights]
    energies = [float(((w @ gram) * w).sum()) for w in samples]
    best, best_error, best_exponent = torch.ones_like(power), math.inf, 0.0
    for exponent in EXPONENTS:
        scale = power.sqrt() ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        scaled = blocks * _outer_inverse(scale, group_size)
        error = sum(
            _rounding_error(w, scale, fmt, group_size, gram, scaled, zero_points) / max(energy, 1e-30)
            for w, fmt, energy in zip(samples, formats, energies, strict=True)
        )
        if error < best_error:
            best, best_error, best_exponent = scale, error, exponent
    return best, best_exponent


def _tied(power: Tensor, tie: Tensor) -> Tensor:
    sums = torch.zeros(int(tie.max()) + 1).index_add_(0, tie, power)
    return (sums / torch.bincount(tie).clamp(min=1))[tie]


def _outer_inverse(scale: Tensor, group_size: int) -> Tensor:
    """1/(s[i]·s[j]) within each group, [n_groups, group_size, group_size]; 0 in what pads a ragged group."""
    inverse = to_groups((1 / scale).unsqueeze(0), group_size)[0]
    return inverse.unsqueeze(1) * inverse.unsqueeze(2)


def _rounding_error(
    weight: Tensor, scale: Tensor, fmt: BitFormat, group_size: int, gram: Tensor, blocks: Tensor, zero_points: str
) -> float:
    """Σ_rows (w − ŵ) H (w − ŵ)ᵀ where ŵ·scale is w·scale rounded to clipped ranges; blocks: of x/scale."""

    def solve(rows: Tensor) -> float:
        groups = to_groups(rows * scale, group_size)
        grid = clipped_grid(groups, blocks, fmt, zero_points)
        rounded = decode(encode(groups, *grid, fmt), *grid).flatten(1)[:, : rows.shape[1]]
        error = rounded.div_(scale).sub_(rows)
        return float(((error @ gram) * error).sum())

    return sum(parallel_map(solve, weight.split(PIECE)))
