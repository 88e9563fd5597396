"""Input features apart: in every linear the few that matter most have int8 codes beside the linear's own format.

A feature k matters by E[x_k²] · ‖δW_k‖², what the error of its column does to the output where features move apart
(OWQ, arXiv 2306.02272, ranks by the Hessian's diagonal times the error). What is stored beside is the column's error in
int8, rounded to nearest, and the feature's number in two bytes: a column of a rotated weight cannot be left out of it,
but what it lacks can be added, as y += ΔW[:, K] · x[K]. No kernel of amq does that: weights are dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amq.formats import FORMATS
from amq.kernels.dense import dequantize_into
from amq.model.inventory import LinearSpec, get_weight
from amq.packing import dequantize
from amq.proxy.fisher import Errors
from amq.proxy.resident import BankReader
from amq.quantize.quantizers import QUANTIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE = "int8"
INDEX_BYTES = 2
STEPS = 40
"""Of the bisection for the share of features."""


def rank_features(
    model: PreTrainedModel, linears: Sequence[LinearSpec], bank: BankReader, squares: Mapping[str, Tensor], fmt: str
) -> dict[str, Tensor]:
    """{linear: int64 [in_features], what matters most first} with that base format. squares: E[x_k²], [in_features]; a
    linear that lacks there has its columns ranked by their errors alone."""
    ranked = {}
    for spec in linears:
        weight = get_weight(model, spec.name)
        error = Errors(bank, spec.name, weight).get(fmt).square().sum(0, dtype=torch.float64)
        ranked[spec.name] = torch.argsort(error * squares.get(spec.name, torch.ones_like(error)), descending=True)
    return ranked


def extra_bytes(linears: Sequence[LinearSpec], share: float, group_size: int) -> int:
    """What `share` of every linear's features takes beside its own format; of each linear that number, rounded down."""
    counts = ((s, int(share * s.in_features)) for s in linears)
    return sum(
        FORMATS[WIDE].stored_bytes(s.out_features, n, group_size) + INDEX_BYTES * n for s, n in counts if n
    )  # fmt: skip


def fitting_share(linears: Sequence[LinearSpec], spare: float, group_size: int) -> float:
    """The largest share, the same in all linears, that takes at most `spare` bytes."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if extra_bytes(linears, middle, group_size) <= spare else (low, middle)
    return low


@torch.no_grad()
def widened(
    model: PreTrainedModel,
    linears: Sequence[LinearSpec],
    bank: BankReader,
    ranked: Mapping[str, Tensor],
    fmt: str,
    share: float,
    group_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """(linear, its weight in `fmt` with the first `share` of its ranked features in int8 besides), one at a time."""
    for spec in linears:
        weight = get_weight(model, spec.name)
        made = torch.empty_like(weight)
        dequantize_into(bank.get(spec.name, fmt), made)
        columns = ranked[spec.name][: int(share * spec.in_features)]
        if len(columns):
            lacking = (weight.float() - made.float())[:, columns].contiguous()
            (wide,) = QUANTIZERS["rtn"]([lacking], [FORMATS[WIDE]], group_size, None)
            made[:, columns] += dequantize(wide[WIDE]).to(made.dtype)
        yield spec.name, made
