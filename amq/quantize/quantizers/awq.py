"""Activation-aware scales (AWQ: Lin et al., MLSys 2024): factors per input feature that make rounding do less harm.

Important features get larger weights and so a finer grid: W·s is rounded in place of W, and x/s takes x's place, by
changing what makes x (`amq.quantize.fold`). The search is over one number: s = rms(x)^α. Each α is judged by what
rounding leaves with ranges clipped as they will be: judged by unclipped or roughly clipped ranges, scales are chosen
that only do what clipping does better (on SmolLM2 at int3 they raised the error of v by a tenth to a sixth). A sample
of the rows is enough for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amq.formats import BitFormat
from amq.quantize.quantizers.clip import clipped_grid, diagonal_blocks
from amq.quantize.quantizers.grid import decode, encode, to_groups
from amq.util.threads import each

EXPONENTS = tuple(i / 16 for i in range(9))
"""α of the search; 0 leaves the weight alone."""
SAMPLE = 256
"""Rows of each weight that the search looks at, evenly spread."""


def search_scale(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor,
    zero_points: str = "fractional",
    tie: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Factors s [in_features] for the linears that share one input, each measured at its own format, and their α.

    weights: [out_features_i, in_features] each; formats: one per weight. gram: float32 [in_features, in_features], the
    mean of x xᵀ. tie: as for `candidate_scales`.
    """
    scales = candidate_scales(gram, tie)
    errors = [
        scale_errors(w, fmt, group_size, gram, scales, zero_points) for w, fmt in zip(weights, formats, strict=True)
    ]
    best = int(torch.stack(errors).sum(0).argmin())
    return scales[best], EXPONENTS[best]


def candidate_scales(gram: Tensor, tie: Tensor | None = None) -> Tensor:
    """rms(x)^α for every α of `EXPONENTS`, [exponents, in_features], the middle of its range at 1.

    tie: int64 [in_features], features with equal numbers get equal factors; None: all are free.
    """
    power = gram.diagonal().clamp(min=1e-12)
    if tie is not None:
        tie = tie.to(power.device)
        sums = power.new_zeros(int(tie.max()) + 1).index_add_(0, tie, power)
        power = (sums / torch.bincount(tie).clamp(min=1))[tie]
    scales = power.sqrt() ** torch.tensor(EXPONENTS, device=power.device).unsqueeze(1)
    middle = (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    return (scales / middle).clamp(1e-4, 1e4)


def scale_errors(
    weight: Tensor,
    fmt: BitFormat,
    group_size: int,
    gram: Tensor,
    scales: Tensor,
    zero_points: str = "fractional",
) -> Tensor:
    """What rounding to clipped ranges does to a linear's outputs under each of `scales`, as a share of their energy.

    A share, because q and k, whose outputs are large, must not decide for v. Returns float64 [exponents], on the CPU.
    """
    sample = weight.float()[:: max(1, len(weight) // SAMPLE)]
    blocks = diagonal_blocks(gram, group_size)

    def error_of(scale: Tensor) -> float:
        inverse = to_groups((1 / scale).unsqueeze(0), group_size)[0]
        groups = to_groups(sample * scale, group_size)
        grid = clipped_grid(groups, blocks * inverse.unsqueeze(1) * inverse.unsqueeze(2), fmt, zero_points)
        rounded = decode(encode(groups, *grid, fmt), *grid).flatten(1)[:, : sample.shape[1]]
        error = rounded.div_(scale).sub_(sample)
        return float(((error @ gram) * error).sum())

    energy = float(((sample @ gram) * sample).sum())
    return torch.tensor(each(error_of, list(scales), gram.device), dtype=torch.float64) / max(energy, 1e-30)
