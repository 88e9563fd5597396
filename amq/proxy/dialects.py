"""Dialects: each group of a weight in the best of several level sets, at the bits of its format and a few per group.

The idea is BlockDialect's (arXiv 2501.01144). A dialect bends the levels of a format towards the middle of their range
or away from it: with t the places of the uniform levels from −1 to 1 they are sign(t) |t|^p, p one of `EXPONENTS`, 1
among them. For every group, in every dialect, scale and zero point are fitted to Σ H[k, k] (w − ŵ)², H = E[x xᵀ], and
the best is kept; codes are found by the compensated rounding of `amq.quantize.quantizers.gptq`, after which scales and
zero points are solved again, as those of a gptq bank. What is stored beside its codes, scales and zero points is the
number of each group's dialect. Weights that the bank rotates are rotated here. No kernel of amq looks levels up by
group: weights are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.formats import BitFormat, n_groups
from amq.kernels.rounding import Compensation
from amq.model.calibration import CalibrationStream
from amq.model.inventory import Inventory, LinearSpec, get_weight
from amq.packing import expand_groups
from amq.proxy.resident import BankReader
from amq.quantize.quantizers.gptq import compensate, compensation_of, solve_grids
from amq.quantize.quantizers.grid import minmax_grid, refit, to_groups
from amq.rotation import rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPONENTS = (0.7, 0.85, 1.0, 1.15, 1.3, 1.45, 1.6, 1.75)
SHRINKS, REFITS = (1.0, 0.85), 1
"""What a group's range is tried at in each dialect, and how often it is refitted: a third of the bank's own search, for
which there are eight times as many sets."""
ROWS = 512
"""Rows whose groups are fitted at once."""


def extra_bytes(spec: LinearSpec, group_size: int) -> int:
    """What the numbers of a linear's dialects take, packed densely."""
    count = spec.out_features * n_groups(spec.in_features, group_size)
    return -(-count * (len(EXPONENTS) - 1).bit_length() // 8)


@dataclass(frozen=True)
class DialectWeight:
    """codes: uint8 [out_features, in_features]. dialect: uint8, scale, zero_point: float16, [out_features, n_groups]
    each, in units of codes. rotated: whether this is W H."""

    format: BitFormat
    group_size: int
    codes: Tensor
    dialect: Tensor
    scale: Tensor
    zero_point: Tensor
    rotated: bool

    def dequantized(self) -> Tensor:
        """float32 [out_features, in_features]."""
        in_features = self.codes.shape[1]
        dialect, scale, zero_point = (
            expand_groups(part, self.group_size, in_features) for part in (self.dialect, self.scale, self.zero_point)
        )
        places = level_sets(self.format)[0][dialect.long(), self.codes.long()]
        weight = (places - zero_point.float()) * scale.float()
        return rotate(weight) if self.rotated else weight


@lru_cache
def level_sets(fmt: BitFormat) -> tuple[Tensor, Tensor]:
    """(levels float32 [dialects, levels], rising from 0 to the last code; what lies between neighbours, one less)."""
    t = torch.linspace(-1, 1, fmt.levels, dtype=torch.float64)
    bent = torch.stack([t.sign() * t.abs() ** p for p in EXPONENTS])
    levels = ((bent + 1) / 2 * fmt.max_code).float()
    return levels, (levels[:, 1:] + levels[:, :-1]) / 2


@torch.no_grad()
def dialect_weights(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    formats: Sequence[BitFormat],
    group_size: int,
    step: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, DialectWeight]]:
    """{linear: {format: its weight in dialects}} of the linears of all blocks, kept on the CPU.

    model: full-precision, in memory whole. windows: int64 [n, length], whose inputs make H. bank: says what is rotated.
    step: called after every block.
    """
    stream, found = CalibrationStream(model, windows), dict[str, dict[str, DialectWeight]]()
    for block in sorted({spec.block for spec in inventory.linears}):
        for group in stream.measure(inventory.in_block(block), advance=True):
            rotated = bool(bank.get(group.linears[0].name, formats[0].name).rotation)
            gram = rotate(rotate(group.gram).t().contiguous()) if rotated else group.gram
            weights = [get_weight(model, spec.name).float() for spec in group.linears]
            whole = torch.cat([rotate(weight) if rotated else weight for weight in weights])
            compensation = compensation_of(gram)
            for fmt in formats:
                made = _quantize(whole, fmt, group_size, compensation, rotated)
                start = 0
                for spec in group.linears:
                    rows = slice(start, start + spec.out_features)
                    found.setdefault(spec.name, {})[fmt.name] = _rows(made, rows)
                    start += spec.out_features
        step()
    return found


def in_dialects(
    model: PreTrainedModel, made: Mapping[str, Mapping[str, DialectWeight]], formats: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """(linear, its weight in that format), one at a time."""
    for name, fmt in formats.items():
        weight = get_weight(model, name)
        yield name, made[name][fmt].dequantized().to(weight.device, weight.dtype)


def _rows(whole: DialectWeight, rows: slice) -> DialectWeight:
    parts = {name: getattr(whole, name)[rows].cpu() for name in ("codes", "dialect", "scale", "zero_point")}
    return replace(whole, **parts)


def _quantize(
    weight: Tensor, fmt: BitFormat, group_size: int, compensation: Compensation, rotated: bool
) -> DialectWeight:
    """weight: float32 [rows, in_features] of linears that share an input, rotated already where `rotated`."""
    importance = to_groups(compensation.hessian.diagonal().unsqueeze(0), group_size)[0]
    fits = [_fit(to_groups(part, group_size), importance, fmt) for part in weight.split(ROWS)]
    dialect, scale, zero = (torch.cat(parts) for parts in zip(*fits, strict=True))  # [rows, n_groups] each
    levels, between = (
        sets.to(weight.device)[dialect.t().contiguous()] for sets in level_sets(fmt)
    )  # [n_groups, rows, …]

    def nearest(wanted: Tensor, group: int) -> Tensor:
        code = torch.searchsorted(between[group], wanted.unsqueeze(1))
        return levels[group].gather(1, code).squeeze(1)

    places = torch.empty(weight.t().shape, device=weight.device)
    grid = scale.t().contiguous(), zero.t().contiguous()
    compensate(weight, places, *grid, group_size, compensation, nearest)
    parts = zip(*(t.split(ROWS) for t in (weight, places.t().contiguous(), scale, zero)), strict=True)
    solved = [solve_grids(w, p, (s, z), group_size, compensation.hessian) for w, p, s, z in parts]
    scale, zero = (torch.cat(some) for some in zip(*solved, strict=True))
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for group in range(len(levels)):
        span = slice(group * group_size, (group + 1) * group_size)
        codes[:, span] = torch.searchsorted(between[group], places.t()[:, span].contiguous())
    return DialectWeight(fmt, group_size, codes, dialect.to(torch.uint8), scale.half(), zero.half(), rotated)


def _fit(groups: Tensor, importance: Tensor, fmt: BitFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Dialect int64, scale and zero point of the least Σ importance (w − ŵ)², [rows, n_groups] each.

    groups: float32 [rows, n_groups, group_size]; importance: [n_groups, group_size].
    """
    shape, device = groups.shape[:2], groups.device
    best = torch.full(shape, torch.inf, device=device)
    dialect, scale, zero = torch.zeros(shape, dtype=torch.int64, device=device), best.clone(), best.clone()
    for number, (levels, between) in enumerate(zip(*level_sets(fmt), strict=True)):
        levels, between = levels.to(device), between.to(device)
        for shrink in SHRINKS:
            s, z = minmax_grid(groups, fmt, shrink)
            for turn in range(REFITS + 1):
                wanted = (groups / s.unsqueeze(-1)).add_(z.unsqueeze(-1))
                places = levels[torch.bucketize(wanted, between)]
                error = ((places - z.unsqueeze(-1)) * s.unsqueeze(-1)).sub_(groups).square_().mul_(importance).sum(-1)
                better = error < best
                best, dialect = torch.where(better, error, best), torch.where(better, number, dialect)
                scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
                if turn < REFITS:
                    s, z = refit(groups, places, importance, s, z)
    return dialect, scale, zero
