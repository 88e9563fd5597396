"""Binding of the quantizing kernels of `amq._cpu` (csrc/cpu/quantize.h): float rows in, packed rows out, in one call.

All rows of all weights in every format are one list of work for the threads; nothing of the weights' size is made
besides the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, n_groups
from amq.kernels.cpu import NO_MEMORY, cpu_module, memory
from amq.packing import PackedWeight

ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What weights may be made of; others are made float32 first."""


@dataclass(frozen=True)
class GridSearch:
    """How the grid of every group is found: `amq.quantize.quantizers.grid.fitted_grid`.

    importance: float32 [in_features], at least 0. zero_points: as in `amq.quantize.quantizers.ZERO_POINTS`.
    """

    importance: Tensor
    zero_points: str
    shrinks: tuple[float, ...]
    refits: int


@dataclass(frozen=True)
class Compensation:
    """What error-compensated rounding needs to know of H [in_features, in_features] = M D Mᵀ, features in `order`.

    hessian: float32, symmetric, in the model's order. factor: float32, in `order`: M, unit upper triangular, anything
    below. order: int64 [in_features]. sweeps: how often all codes are looked at again.
    """

    hessian: Tensor
    factor: Tensor
    order: Tensor
    sweeps: int


def quantize_rows(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    search: GridSearch,
    compensation: Compensation | None,
    isa: str = "",
) -> list[dict[str, PackedWeight]]:
    """One {format name: PackedWeight} per weight [out_features_i, in_features], any float dtype, on the CPU.

    compensation: None rounds to nearest. isa: one of `cpu_module().isas()`; the empty string means AMQ_CPU_ISA or the
    best.
    Raises AmqError where the module cannot do it, with its reason.
    """
    if not weights or not formats:
        return [{} for _ in weights]
    in_features = weights[0].shape[1]
    rows = [_native(weight) for weight in weights]
    results = [{fmt.name: _empty(len(w), in_features, group_size, fmt) for fmt in formats} for w in rows]
    importance, shrinks = search.importance.float().contiguous(), torch.tensor(search.shrinks)
    given = [t.contiguous() for t in _tensors(compensation, group_size)] if compensation is not None else []
    names = ("hessian", "factor", "order", "sums", "totals")
    try:
        cpu_module().quantize(
            weights=[
                (memory(w), ELEMENTS[w.dtype], len(w), [tuple(map(memory, p.parts.values())) for p in result.values()])
                for w, result in zip(rows, results, strict=True)
            ],
            formats=[(fmt.levels, fmt.unit_codes, fmt.unit_bytes) for fmt in formats],
            in_features=in_features,
            group_size=group_size,
            zero_points=search.zero_points,
            importance=memory(importance),
            shrinks=memory(shrinks),
            refits=search.refits,
            sweeps=compensation.sweeps if compensation is not None else 0,
            **(dict(zip(names, map(memory, given), strict=True)) if given else dict.fromkeys(names, NO_MEMORY)),
            threads=torch.get_num_threads(),
            isa=isa,
        )
    except ValueError as error:
        raise AmqError(f"quantizing weights of {in_features} input features at group {group_size}: {error}") from error
    return results


def _native(weight: Tensor) -> Tensor:
    return (weight.detach() if weight.dtype in ELEMENTS else weight.detach().float()).contiguous()


def _empty(rows: int, in_features: int, group_size: int, fmt: BitFormat) -> PackedWeight:
    groups = n_groups(in_features, group_size)
    qweight = torch.empty(rows, fmt.row_bytes(in_features), dtype=torch.uint8)
    scale, zero_point = (torch.empty(rows, groups, dtype=torch.float16) for _ in range(2))
    return PackedWeight(fmt, in_features, group_size, qweight, scale, zero_point)


def _tensors(of: Compensation, group_size: int) -> tuple[Tensor, ...]:
    """What the module takes: the parts of `of`, and sums of H over each group's columns, and of these over its rows."""
    in_features = len(of.order)
    group = torch.arange(in_features) // group_size
    groups = n_groups(in_features, group_size)
    sums = torch.zeros(in_features, groups).index_add_(1, group, of.hessian)
    totals = torch.zeros(groups, groups, dtype=torch.float64).index_add_(0, group, sums.double())
    return of.hessian, of.factor, of.order, sums, totals
