"""Error-compensated rounding (GPTQ: Frantar et al., ICLR 2023) for several linears and formats at once.

With H = E[x xᵀ] over calibration inputs, the output error of a row is (w − ŵ) H (w − ŵ)ᵀ. Input features are rounded
one by one, in order of falling H[k, k]; each takes up the errors of those before it through the Cholesky
factor of H. Two things differ from the paper's algorithm. The grids are fitted first, to the original weights
(`fitted_grid` with importance diag H), so the order is free. And once all features are rounded, every code is looked at
again, `SWEEPS` times, with the errors of all others as they are (coordinate descent: QuantEase, arXiv 2309.01885); then
scale and zero point of all groups of a row are solved again for the least output error, a linear least-squares problem
of 2·n_groups unknowns.

Rows do not interact, so linears that share an input, at all their formats, are stacked into one tall matrix and one
loop over the input features serves them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
    stacked,
    storable,
    to_groups,
)
from amq.util.symmetric import cholesky
from amq.util.threads import each

Grid = tuple[Tensor, Tensor]
"""Scale and zero point, [rows, n_groups] each."""
Nearest = Callable[[Tensor, int], Tensor]
"""(what a feature of all rows wants to be, in units of codes, float32 [rows], its group) → the nearest codes, float32;
it may write into its argument."""

log = logging.getLogger(__name__)

DAMPING = 0.3
"""Added to the diagonal of H, as a share of its mean; raised tenfold until the Cholesky factor exists. More than the
paper's 0.01, because calibration text is not what the model will read. On SmolLM2, calibrated on 16 windows of the
language reference, two sweeps at 0.3 leave an output error 1.4 % below those at 0.1 on docstrings, and 5 % on
WikiText, at int2 and int3; on the reference itself it is 7 % above."""
SWEEPS = 4
"""How often every code is looked at again, before the grids are solved. On SmolLM2, rotated, group 64, blocks 1, 4 and
7: the output error on calibration text falls by 6 % (int2) and 5 % (int3) at the first, 10 and 9 % after four; on two
other texts by 4 and 2 %, 3 and 1.5 %. A sweep costs a twentieth of the whole."""
BLOCK = 64
"""Input features whose errors are spread at once."""
ROWS = 512
"""Rows worked on at once on a CPU, whose second-level cache holds their block of features; at least, on a GPU."""
ROUND_BYTES, ROUND_BYTES_PER_CODE = 1 << 30, 9
"""Most bytes that rounding takes at once on a GPU, and what it takes for each code: its error, twice, and itself."""
REFIT_BYTES, REFIT_BYTES_PER_CODE, REFIT_BYTES_PER_ENTRY = 512 << 20, 32, 28
"""The same for fitting grids: for each code of a row eight float32, and for each entry of its matrix one, and
three float64 that it is solved in."""
RIDGE = 1e-6
"""Added to the scaled diagonal of a row's matrix, as in csrc/cpu/quantize_refit.h."""
MOST_ZERO = 1024.0
"""Zero points stay below it."""


@dataclass(frozen=True)
class Rounding:
    """What rounding of all weights that read one input has in common. compensation: of their H."""

    compensation: Compensation
    zero_points: str

    @staticmethod
    def of(gram: Tensor, zero_points: str) -> Rounding:
        """gram: float32 [in_features, in_features], the mean of x xᵀ."""
        return Rounding(compensation_of(gram), check_zero_points(zero_points))

    @property
    def hessian(self) -> Tensor:
        """H, damped."""
        return self.compensation.hessian

    def quantize(
        self, weights: Sequence[Tensor], formats: Sequence[BitFormat], group_size: int
    ) -> list[dict[str, PackedWeight]]:
        """On the CPU by csrc/cpu/quantize.h, in all modes of `zero_points`; on other devices in torch."""
        if self.hessian.device.type != "cpu":
            return self.in_torch(weights, formats, group_size)
        search = GridSearch(self.hessian.diagonal(), self.zero_points, SHRINKS, REFITS)
        return quantize_rows(weights, formats, group_size, search, self.compensation)

    def in_torch(
        self, weights: Sequence[Tensor], formats: Sequence[BitFormat], group_size: int
    ) -> list[dict[str, PackedWeight]]:
        """See `quantize_in_torch`."""
        if not weights or not formats:
            return [{} for _ in weights]
        problem = _Problem(self.compensation, tuple(formats), group_size, self.zero_points)
        chunks = torch.cat([w.detach() for w in weights]).split(problem.rows_at_once)
        solved = [*zip(*each(problem.solve, chunks, self.hessian.device), strict=True)]  # per format, per chunk
        results: list[dict[str, PackedWeight]] = [{} for _ in weights]
        for fmt, parts in zip(formats, solved, strict=True):
            whole, start = stacked(parts), 0
            for result, weight in zip(results, weights, strict=True):
                result[fmt.name] = whole.rows(start, start + weight.shape[0])
                start += weight.shape[0]
        return results


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`. gram: float32 [in_features, in_features], the mean of x xᵀ; required."""
    if gram is None:
        raise AmqError("the gptq quantizer needs calibration inputs (gram); rtn and hqq do not")
    return Rounding.of(gram, zero_points).quantize(weights, formats, group_size)


def quantize_in_torch(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """`quantize` in plain torch, on the device of `weights` and `gram`: the specification of the kernels, and what runs
    where they do not.

    Codes may differ where rounding in float32 breaks a tie the other way, which changes what follows in that row;
    output errors agree as tests/test_quantize_gptq.py says.
    """
    return Rounding.of(gram, zero_points).in_torch(weights, formats, group_size)


def damped(gram: Tensor) -> Tensor:
    """gram with its diagonal raised until it is safely positive definite. Features that never fire get the mean."""
    return _factorized(gram)[0]


def compensation_of(gram: Tensor) -> Compensation:
    """What rounding needs of H: it, damped, and H = M D Mᵀ for its features in order of falling H[k, k].

    All on the device of `gram`; what is below the diagonal of the factor is of no use.
    """
    hessian, order, upper = _factorized(gram)
    upper /= upper.diagonal().clone().unsqueeze(1)
    return Compensation(hessian, upper.t().flip(0, 1), order, SWEEPS)


def _factorized(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gram, damped; its features in order of falling diagonal; and R, Rᵀ R = gram in the reverse order (above its
    diagonal)."""
    if not bool(torch.isfinite(gram).all()):
        raise AmqError("the calibration inputs are not finite (NaN or infinity): load the model in a wider --dtype")
    mean = gram.diagonal().mean().clamp(min=1e-12)
    share = DAMPING
    while share < 1e3:
        hessian = gram.clone()
        hessian.diagonal().add_(share * mean)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        backwards = order.flip(0)
        upper = _upper_factor(hessian[backwards.unsqueeze(1), backwards])
        if upper is not None:
            if share > DAMPING:
                log.warning("the calibration inputs give a singular matrix: damping raised to %g of its mean", share)
            return hessian, order, upper
        share *= 10
    raise AmqError("the calibration inputs give a singular matrix even with heavy damping: use more calibration text")


def _upper_factor(matrix: Tensor) -> Tensor | None:
    """R, Rᵀ R = matrix, above its diagonal, perhaps in the place of `matrix`; None where it is indefinite."""
    if matrix.device.type == "cpu":
        return matrix if cholesky(matrix) else None
    upper, info = torch.linalg.cholesky_ex(matrix, upper=True)
    return None if int(info) else upper


@dataclass(frozen=True)
class _Problem:
    """What all rows that read one input have in common."""

    compensation: Compensation
    formats: tuple[BitFormat, ...]
    group_size: int
    zero_points: str

    @property
    def rows_at_once(self) -> int:
        """Rows whose codes are found together: on a GPU as many as `ROUND_BYTES` hold, since each feature is a dozen
        launches however many rows there are."""
        features = len(self.compensation.order)
        if self.compensation.order.device.type == "cpu":
            return ROWS
        return max(ROWS, ROUND_BYTES // (ROUND_BYTES_PER_CODE * features * len(self.formats)))

    def solve(self, weight: Tensor) -> list[PackedWeight]:
        """Some rows in every format."""
        step = self._rows_to_refit
        importance = to_groups(self.compensation.hessian.diagonal().unsqueeze(0), self.group_size)[0]
        found = []  # per piece, per format: scale, zero_point
        for part in weight.split(step):
            groups = to_groups(part, self.group_size)
            found.append([fitted_grid(groups, importance, fmt, self.zero_points) for fmt in self.formats])
        grids = []
        for pieces in zip(*found, strict=True):
            grids.append((torch.cat([scale for scale, _ in pieces]), torch.cat([zero for _, zero in pieces])))
        solutions = []
        for fmt, grid, codes in zip(self.formats, grids, self._round(weight, grids), strict=True):
            parts = zip(*(tensor.split(step) for tensor in (weight, codes, *grid)), strict=True)
            solutions.append(stacked([self._refit(w.float(), c, (s, z), fmt) for w, c, s, z in parts]))
        return solutions

    @property
    def _rows_to_refit(self) -> int:
        """Rows whose grids are fitted and solved together."""
        if self.compensation.order.device.type == "cpu":
            return ROWS
        features = len(self.compensation.order)
        unknowns = 2 * n_groups(features, self.group_size)
        return max(1, REFIT_BYTES // (REFIT_BYTES_PER_CODE * features + REFIT_BYTES_PER_ENTRY * unknowns**2))

    def _refit(self, weight: Tensor, codes: Tensor, grid: Grid, fmt: BitFormat) -> PackedWeight:
        """codes: uint8 [rows, in_features]."""
        moves = self.zero_points == "fractional"
        found = solve_grids(weight, codes.float(), grid, self.group_size, self.compensation.hessian, moves)
        return packed(codes, *found, fmt, self.group_size)

    def _round(self, weight: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Codes of every format by error-compensated rounding, uint8 [rows, in_features] each, views."""
        # Feature-major [in_features, formats·rows], so that one feature of all rows is contiguous.
        scale, zero = (torch.cat([grid[i].t() for grid in grids], dim=1) for i in range(2))  # [n_groups, …]
        rows, device = len(weight), weight.device
        top = torch.cat([torch.full((rows,), float(f.max_code), device=device) for f in self.formats])

        def nearest(code: Tensor, group: int) -> Tensor:
            return torch.minimum(code.round_().clamp_(min=0.0), top, out=code)

        codes = torch.empty(weight.shape[1], len(top), dtype=torch.uint8, device=device)
        compensate(weight, codes, scale, zero, self.group_size, self.compensation, nearest)
        return [part.t() for part in codes.split(rows, dim=1)]


def compensate(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    compensation: Compensation,
    nearest: Nearest,
) -> None:
    """Writes `codes` by error-compensated rounding, and sweeps over them.

    weight: [rows, in_features]. codes: [in_features, columns], of any dtype that holds what `nearest` gives, in the
    model's order; the weight's rows are repeated over the columns. scale, zero: float32 [n_groups, columns].

    (w − ŵ) H (w − ŵ)ᵀ = Σ_k D[k] (e[k] + Σ_{j<k} M[j, k] e[j])² with e = w − ŵ: each feature in turn rounds what
    makes its own term least.
    """
    (in_features, columns), order, factor = codes.shape, compensation.order, compensation.factor
    places, errors = order.cpu().tolist(), torch.empty(in_features, columns, device=codes.device)
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        own = weight[:, order[start:stop]].t().float().repeat(1, columns // len(weight))
        target = torch.addmm(own, factor[:start, start:stop].t(), errors[:start])
        for k in range(start, stop):
            group = places[k] // group_size
            code = nearest(target[k - start].div(scale[group]).add_(zero[group]), group)
            codes[places[k]] = code
            error = torch.sub(zero[group], code, out=errors[k]).mul_(scale[group]).add_(own[k - start])
            target[k - start + 1 :].addr_(factor[k, k + 1 : stop], error)
    if compensation.sweeps:
        errors[order] = errors.clone()  # in the model's order from here on
        for _ in range(compensation.sweeps):
            _sweep(codes, errors, scale, zero, group_size, compensation.hessian, nearest)


def _sweep(
    codes: Tensor, errors: Tensor, scale: Tensor, zero: Tensor, group_size: int, hessian: Tensor, nearest: Nearest
) -> None:
    """Changes codes one by one where that lowers the output error, and the errors w − ŵ with them.

    With all else as it is, e[k] is best where (e H)[k] = 0, so the best code is that nearest to
    ŵ[k] + (e H)[k] / H[k, k].
    """
    in_features = len(codes)
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        push = hessian[start:stop] @ errors
        for k in range(start, stop):
            group = k // group_size
            rounded = (codes[k] - zero[group]).mul_(scale[group])
            code = push[k - start].div(hessian[k, k]).add_(rounded)
            code = nearest(code.div_(scale[group]).add_(zero[group]), group)
            codes[k] = code
            move = rounded.sub_(code.sub_(zero[group]).mul_(scale[group]))
            errors[k] += move
            push[k - start + 1 :].addr_(hessian[k, k + 1 : stop], move)


def solve_grids(
    weight: Tensor, codes: Tensor, grid: Grid, group_size: int, hessian: Tensor, zeros_move: bool = True
) -> Grid:
    """Scale and zero point of every row's groups for the least output error at fixed codes.

    Unknowns are a step along every group's rounded weights ŵ_g and, where zero points move, one along its ones: α_g and
    β_g make of (c − z)·s the grid s' = s·(1 + α), z' = z − β / s'. With these Φ the optimum solves
    (Φᵀ H Φ) δ = Φᵀ H (w − ŵ): so small an error is not lost beside w in float32. A row whose solution is not storable,
    or not better, keeps its grid.
    """
    in_features = weight.shape[1]
    scale, zero = expand(grid, group_size, in_features)
    rounded = (codes - zero).mul_(scale)
    del scale, zero
    normal = _normal_matrix(rounded, group_size, hessian, zeros_move)
    pushed = to_groups((weight - rounded) @ hessian, group_size)
    right = [(to_groups(rounded, group_size) * pushed).sum(-1)] + [pushed.sum(-1)] * zeros_move
    found, good = _solve(normal, torch.cat(right, dim=1))
    steps = found.view(len(weight), len(right), -1)
    scale = grid[0] * (1 + steps[:, 0])
    zero = grid[1] - steps[:, 1] / scale if zeros_move else grid[1]
    good = good & (scale > TINY) & torch.isfinite(zero) & (zero.abs() < MOST_ZERO)
    good = good.all(-1, keepdim=True)  # groups of a row were solved together: take all or none
    new = storable(torch.where(good, scale, grid[0]), torch.where(good, zero, grid[1]))
    return _better_rows(weight, codes, new, grid, group_size, hessian)


def _normal_matrix(rounded: Tensor, group_size: int, hessian: Tensor, ones_too: bool) -> Tensor:
    """Φᵀ H Φ of every row, float32 [rows, unknowns, unknowns]: all groups' ŵ_g, and all groups' ones after them."""
    (rows, in_features), kinds = rounded.shape, 1 + ones_too
    groups = n_groups(in_features, group_size)
    normal = torch.empty(rows, kinds, groups, kinds, groups, device=rounded.device)
    parts = to_groups(rounded, group_size)
    for g in range(groups):
        span = slice(g * group_size, min((g + 1) * group_size, in_features))
        product = to_groups(rounded[:, span] @ hessian[span], group_size)  # [rows, groups, group_size]
        normal[:, 0, g, 0] = (product * parts).sum(-1)
        if ones_too:
            ones = to_groups(hessian[span].sum(0, keepdim=True), group_size)[0]  # [groups, group_size]
            normal[:, 0, g, 1] = product.sum(-1)
            normal[:, 1, g, 0] = (parts * ones).sum(-1)
            normal[:, 1, g, 1] = ones.sum(-1)
    return normal.view(rows, kinds * groups, kinds * groups)


def _solve(normal: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(δ float32 [rows, unknowns] of normal·δ = right, whether there is one [rows, 1]): by Cholesky in float64, the
    diagonal scaled to one."""
    diagonal = normal.diagonal(dim1=1, dim2=2).double()
    size = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    scaled = normal.double().mul_(size.unsqueeze(2)).mul_(size.unsqueeze(1))
    scaled.diagonal(dim1=1, dim2=2).fill_(1 + RIDGE)
    factor, info = torch.linalg.cholesky_ex(scaled)
    found = torch.cholesky_solve((right.double() * size).unsqueeze(-1), factor).squeeze(-1) * size
    return found.float(), (info == 0).unsqueeze(-1)


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
