"""Two-sided rounding: rows of a linear make up for each other's errors, as GPTQ's input features do (YAQA: Tseng et
al., arXiv 2505.22988).

To second order an error δW of a linear costs tr(G δW H δWᵀ), with H = E[x xᵀ] of its inputs and G = E[g gᵀ] of the
gradients at its outputs (a Kronecker factor each of the loss's curvature). GPTQ takes G as the identity: rows do not
interact. Here rows are sorted by G's diagonal and cut into `PARTS`, and each part is rounded by GPTQ, in its turn,
towards a target that makes up for the errors of the parts before it as well as can be while those after it are free:
with D the rows that are done and F the others, δ_F = −G_FF⁻¹ G_FD δ_D. Then each part is rounded once more towards what
is best with all others as they are, and kept so where that is better. Within a part rows do not interact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels.dense import dequantized
from amq.packing import PackedWeight
from amq.quantize.quantizers.gptq import Rounding
from amq.quantize.quantizers.grid import stacked

PARTS = 8
DAMPING = 1.0
"""Added to the diagonal of G, as a share of its mean: G is estimated from a few times as many tokens as it has rows. On
SmolLM2, six blocks in int3, 10,000 tokens: 1.0 leaves 9 and 5 % less divergence than gptq on two other texts, 0.3
leaves 7 % less and 2 % more, 4.0 leaves 4 and 6 % less (docs/decisions.md)."""


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None,
    zero_points: str = "fractional",
    outputs: Sequence[Tensor | None] = (),
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`. gram: H, required, weighted by tokens as for `guided`.

    outputs: G of each weight, float32 [out_features, out_features] up to a factor; a weight that has none, such as an
        expert's, whose tokens differ, is rounded row by row.
    """
    if gram is None:
        raise AmqError("the two_sided quantizer needs calibration inputs (gram); rtn and hqq do not")
    rounding, found = Rounding.of(gram, zero_points), list[dict[str, PackedWeight]]()
    for index, weight in enumerate(weights):
        moments = outputs[index] if index < len(outputs) else None
        if moments is None or not bool(moments.diagonal().any()):
            found += rounding.quantize([weight], formats, group_size)
            continue
        rows = _Rows.of(moments.to(weight.device))
        found.append({fmt.name: _round(weight.float(), fmt, group_size, rounding, rows) for fmt in formats})
    return found


@dataclass(frozen=True)
class _Rows:
    """What the parts of a weight have to do with each other.

    parts: int64 row indices. ahead: of each part, [rows, rows of all parts before it], what a change there asks of it
    while those after it are free; beside: [rows, all other rows], while none is. own: its part of G.
    """

    parts: tuple[Tensor, ...]
    ahead: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]
    own: tuple[Tensor, ...]

    @staticmethod
    def of(moments: Tensor) -> _Rows:
        """moments: G. Raises AmqError where it is not finite."""
        if not bool(torch.isfinite(moments).all()):
            raise AmqError("the gradients are not finite (NaN or infinity): load the model in a wider --dtype")
        g = moments.clone()
        g.diagonal().add_(DAMPING * g.diagonal().mean())
        order = g.diagonal().argsort(descending=True, stable=True)
        g = g[order][:, order]
        ends = [0]
        for part in order.chunk(PARTS):
            ends.append(ends[-1] + len(part))
        ahead, beside, own = [], [], []
        for first, end in zip(ends, ends[1:], strict=False):
            mine, others = slice(first, end), torch.cat([g[first:end, :first], g[first:end, end:]], 1)
            ahead.append(_solved(g[first:, first:], g[first:, :first])[: end - first])
            beside.append(_solved(g[mine, mine], others))
            own.append(g[mine, mine])
        return _Rows(order.chunk(PARTS), tuple(ahead), tuple(beside), tuple(own))


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix⁻¹ right, of a positive definite matrix: its diagonal has been raised."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix)) if right.shape[1] else right


def _round(weight: Tensor, fmt: BitFormat, group_size: int, rounding: Rounding, rows: _Rows) -> PackedWeight:
    """weight: float32 [out_features, in_features]."""
    change, made = torch.zeros_like(weight), list[PackedWeight]()  # change: Ŵ − W of the rows that are done

    def towards(target: Tensor) -> tuple[PackedWeight, Tensor]:
        (found,) = rounding.quantize([target], [fmt], group_size)
        return found[fmt.name], dequantized(found[fmt.name])

    for index, part in enumerate(rows.parts):
        before = torch.cat(rows.parts[:index]) if index else part[:0]
        packed, rounded = towards(weight[part] - rows.ahead[index] @ change[before])
        made.append(packed)
        change[part] = rounded - weight[part]
    for index, part in enumerate(rows.parts):
        others = torch.cat([*rows.parts[:index], *rows.parts[index + 1 :]]) if len(rows.parts) > 1 else part[:0]
        target = weight[part] - rows.beside[index] @ change[others]
        packed, rounded = towards(target)
        now, new = weight[part] + change[part] - target, rounded - target
        if _cost(new, rows.own[index], rounding.hessian) < _cost(now, rows.own[index], rounding.hessian):
            made[index] = packed
            change[part] = rounded - weight[part]
    whole, places = stacked(made), torch.cat(rows.parts).argsort().to(made[0].qweight.device)
    return replace(whole, qweight=whole.qweight[places], scale=whole.scale[places], zero_point=whole.zero_point[places])


def _cost(error: Tensor, moments: Tensor, hessian: Tensor) -> float:
    return float(((moments @ error) * (error @ hessian)).sum(dtype=torch.float64))
