"""Error-compensated rounding (GPTQ: Frantar et al., ICLR 2023) for several linears and formats at once.

With H = E[x xᵀ] over calibration inputs, the output error of a row is (w − ŵ) H (w − ŵ)ᵀ. Input features are rounded
one by one, in order of falling H[k, k]; after each, the features still open take up its error through the Cholesky
factor of H⁻¹. Two things differ from the paper's algorithm. The grids are fitted first, to the original weights
(`fitted_grid` with importance diag H), so the order is free; and once all codes are fixed, scale and zero point of all
groups of a row are solved again for the least output error, a linear least-squares problem of 2·n_groups unknowns.

Rows do not interact, so linears that share an input, at all their formats, are stacked into one tall matrix and one
loop over the input features serves them all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, n_groups
from amq.kernels.rounding import Compensation, GridSearch, quantize_rows
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import (
    REFITS,
    SHRINKS,
    TINY,
    check_zero_points,
    expand,
    fitted_grid,
    packed,
    storable,
    to_groups,
)
from amq.util.symmetric import cholesky, mirror
from amq.util.threads import parallel_map

Grid = tuple[Tensor, Tensor]
"""Scale and zero point, [rows, n_groups] each."""

log = logging.getLogger(__name__)

DAMPING = 0.1
"""Added to the diagonal of H, as a share of its mean; raised tenfold until the Cholesky factor exists. More than the
paper's 0.01, because calibration text is not what the model will read: on SmolLM2, calibrated on the language reference
and measured on WikiText, 0.1 lowers the output error at int2 and int3 by 4 to 5 %, and raises it by 2 to 3 % on the
reference."""
BLOCK = 64
"""Input features whose errors are spread at once."""
ROWS = 512
"""Rows worked on at once: their block of features stays in the CPU's second-level cache."""


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`. gram: float32 [in_features, in_features], the mean of x xᵀ; required.

    On the CPU by csrc/cpu/quantize.h, in all modes of `zero_points`; on other devices by `quantize_in_torch`.
    """
    if gram is None:
        raise AmqError("the gptq quantizer needs calibration inputs (gram); rtn and hqq do not")
    if gram.device.type != "cpu":
        return quantize_in_torch(weights, formats, group_size, gram, zero_points)
    compensation = compensation_of(gram)
    search = GridSearch(compensation.hessian.diagonal(), check_zero_points(zero_points), SHRINKS, REFITS)
    return quantize_rows(weights, formats, group_size, search, compensation)


def quantize_in_torch(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """`quantize` in plain torch: the specification of the kernels, and what runs where they do not.

    Codes may differ where rounding in float32 breaks a tie the other way, which changes what follows in that row;
    output errors agree as tests/test_quantize_gptq.py says.
    """
    hessian, order, _ = _factorized(gram)
    # Upper Cholesky factor of H⁻¹ in that order: row k tells how later features make up for an error at k.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    problem = _Problem(
        hessian, order, torch.linalg.cholesky(inverse, upper=True), tuple(formats), group_size, zero_points
    )
    chunks = torch.cat([w.float() for w in weights]).split(ROWS)
    solved = parallel_map(problem.solve, chunks)  # per chunk, per format: codes, scale, zero_point
    results: list[dict[str, PackedWeight]] = [{} for _ in weights]
    for index, fmt in enumerate(formats):
        codes, scale, zero_point = (torch.cat(parts) for parts in zip(*(chunk[index] for chunk in solved), strict=True))
        whole = packed(codes, scale, zero_point, fmt, group_size)
        start = 0
        for result, weight in zip(results, weights, strict=True):
            result[fmt.name] = whole.rows(start, start + weight.shape[0])
            start += weight.shape[0]
    return results


def damped(gram: Tensor) -> Tensor:
    """gram with its diagonal raised until it is safely positive definite. Features that never fire get the mean."""
    return _factorized(gram)[0]


def compensation_of(gram: Tensor) -> Compensation:
    """What the kernels need of H: it, damped, and H = M D Mᵀ for its features in order of falling H[k, k].

    M D Mᵀ is U⁻¹ U⁻ᵀ with the factor of the reference, H⁻¹ = Uᵀ U, so that one Cholesky factor does for three and an
    inverse.
    """
    hessian, order, upper = _factorized(gram)
    pivots = upper.diagonal().clone()
    upper /= pivots.unsqueeze(1)
    mirror(upper)
    return Compensation(hessian, upper.flip(0, 1), pivots.flip(0).square(), order)


def _factorized(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gram, damped; its features in order of falling diagonal; and R, Rᵀ R = gram in the reverse order (above its
    diagonal; on the CPU)."""
    if not bool(torch.isfinite(gram).all()):
        raise AmqError("the calibration inputs are not finite (NaN or infinity): load the model in a wider --dtype")
    mean = gram.diagonal().mean().clamp(min=1e-12)
    share = DAMPING
    while share < 1e3:
        hessian = gram.clone()
        hessian.diagonal().add_(share * mean)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        backwards = order.flip(0)
        upper = hessian[backwards][:, backwards].cpu().contiguous()
        if cholesky(upper):
            if share > DAMPING:
                log.warning("the calibration inputs give a singular matrix: damping raised to %g of its mean", share)
            return hessian, order, upper
        share *= 10
    raise AmqError("the calibration inputs give a singular matrix even with heavy damping: use more calibration text")


@dataclass(frozen=True)
class _Problem:
    """What all rows that read one input have in common."""

    hessian: Tensor
    order: Tensor
    factor: Tensor
    formats: tuple[BitFormat, ...]
    group_size: int
    zero_points: str

    def solve(self, weight: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(codes float32 [rows, in_features], scale, zero_point [rows, n_groups]) of some rows in every format."""
        importance = to_groups(self.hessian.diagonal().unsqueeze(0), self.group_size)[0]
        groups = to_groups(weight, self.group_size)
        grids = [fitted_grid(groups, importance, fmt, self.zero_points) for fmt in self.formats]
        solutions = []
        for grid, codes in zip(grids, self._round(weight, grids), strict=True):
            refit = _refit_rows if self.zero_points == "fractional" else _refit_scales
            solutions.append((codes, *refit(weight, codes, grid, self.group_size, self.hessian)))
        return solutions

    def _round(self, weight: Tensor, grids: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Codes of every format by error-compensated rounding, float32 [rows, in_features] each."""
        rows, in_features = weight.shape
        order, factor = self.order, self.factor
        # Feature-major [in_features, formats·rows], so that one feature of all rows is contiguous.
        work = weight.t()[order].repeat(1, len(self.formats))
        wide = [expand(grid, self.group_size, in_features) for grid in grids]
        scale = torch.cat([s.t()[order] for s, _ in wide], dim=1)
        zero = torch.cat([z.t()[order] for _, z in wide], dim=1)
        top = torch.cat([torch.full((rows,), float(f.max_code)) for f in self.formats])
        codes = torch.empty_like(work)
        for start in range(0, in_features, BLOCK):
            stop = min(start + BLOCK, in_features)
            errors = torch.empty(stop - start, work.shape[1])
            for k in range(start, stop):
                code = codes[k]
                torch.div(work[k], scale[k], out=code).add_(zero[k]).round_().clamp_(min=0.0).clamp_(max=top)
                error = torch.sub(code, zero[k], out=errors[k - start]).mul_(scale[k]).sub_(work[k]).div_(-factor[k, k])
                work[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
            work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        unordered = torch.empty_like(codes)
        unordered[order] = codes
        return [part.t().contiguous() for part in unordered.split(rows, dim=1)]


def _refit_rows(weight: Tensor, codes: Tensor, grid: Grid, group_size: int, hessian: Tensor) -> Grid:
    """Scale and zero point of every row's groups for the least output error at fixed codes.

    ŵ = Σ_g scale_g·code_g + offset_g·1_g is linear in its 2·n_groups unknowns θ, so with Φ [in_features, 2·n_groups]
    the optimum solves (Φᵀ H Φ) θ = Φᵀ H w. A row whose solution is not storable, or not better, keeps its grid.
    """
    rows, in_features = weight.shape
    groups = n_groups(in_features, group_size)
    columns = [slice(g * group_size, min((g + 1) * group_size, in_features)) for g in range(groups)]
    normal = torch.empty(rows, 2, groups, 2, groups)
    right = torch.empty(rows, 2, groups)
    target = weight @ hessian
    for g, span in enumerate(columns):
        product = codes[:, span] @ hessian[span]  # [rows, in_features]
        ones = hessian[span].sum(0)  # [in_features]
        right[:, 0, g] = (codes[:, span] * target[:, span]).sum(-1)
        right[:, 1, g] = target[:, span].sum(-1)
        for other, at in enumerate(columns):
            normal[:, 0, g, 0, other] = (product[:, at] * codes[:, at]).sum(-1)
            normal[:, 0, g, 1, other] = product[:, at].sum(-1)
            normal[:, 1, g, 0, other] = codes[:, at] @ ones[at]
            normal[:, 1, g, 1, other] = ones[at].sum()
    normal = normal.view(rows, 2 * groups, 2 * groups)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1)
    normal += torch.diag_embed(ridge.unsqueeze(-1).expand(-1, 2 * groups))
    theta, info = torch.linalg.solve_ex(normal.double(), right.view(rows, -1, 1).double())
    scale, offset = theta.view(rows, 2, groups).float().unbind(1)
    zero_point = -offset / scale
    good = (info == 0).unsqueeze(-1) & (scale > TINY) & torch.isfinite(zero_point) & (zero_point.abs() < 1024)
    good = good.all(-1, keepdim=True)  # groups of a row were solved together: take all or none
    new = storable(torch.where(good, scale, grid[0]), torch.where(good, zero_point, grid[1]))
    return _better_rows(weight, codes, new, grid, group_size, hessian)


def _refit_scales(weight: Tensor, codes: Tensor, grid: Grid, group_size: int, hessian: Tensor) -> Grid:
    """As `_refit_rows` with the zero points as they are: n_groups unknowns, one basis vector per group."""
    rows, in_features = weight.shape
    groups = n_groups(in_features, group_size)
    steps = to_groups(codes - expand(grid, group_size, in_features)[1], group_size)
    target = to_groups(weight @ hessian, group_size)
    normal = torch.empty(rows, groups, groups)
    for g in range(groups):
        span = slice(g * group_size, min((g + 1) * group_size, in_features))
        product = to_groups(steps[:, g, : span.stop - span.start] @ hessian[span], group_size)
        normal[:, g] = (product * steps).sum(-1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1)
    normal += torch.diag_embed(ridge.unsqueeze(-1).expand(-1, groups))
    right = (steps * target).sum(-1, keepdim=True)
    scale, info = torch.linalg.solve_ex(normal.double(), right.double())
    scale = scale.squeeze(-1).float()
    good = ((info == 0).unsqueeze(-1) & (scale > TINY)).all(-1, keepdim=True)
    new = storable(torch.where(good, scale, grid[0]), grid[1])
    return _better_rows(weight, codes, new, grid, group_size, hessian)


def _better_rows(weight: Tensor, codes: Tensor, new: Grid, old: Grid, group_size: int, hessian: Tensor) -> Grid:
    """`new` for the rows whose output error it lowers, `old` for the others."""
    better = _output_error(weight, codes, new, group_size, hessian) < _output_error(
        weight, codes, old, group_size, hessian
    )
    better = better.unsqueeze(-1)
    return torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1])


def _output_error(weight: Tensor, codes: Tensor, grid: Grid, group_size: int, hessian: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each row, [rows]."""
    scale, zero = expand(grid, group_size, weight.shape[1])
    error = weight - (codes - zero) * scale
    return ((error @ hessian) * error).sum(-1)
