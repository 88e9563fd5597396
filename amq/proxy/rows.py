"""Row blocks: what parts of a linear's output features cost in each format, and a model put together from such parts.

The output rows of a linear are sorted by salience Σ_t g_n² · (δW x)_n² in the middle format and cut into blocks of
equal count (MixLLM, arXiv 2412.14590, ranks output features of the whole model by loss). Each block has Fisher scores
of its own, as `amq.proxy.fisher` gives whole linears theirs. No kernel runs a linear whose rows have several formats:
weights are put together from the bank's, dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.kernels.dense import dequantize_into
from amq.model.inventory import Inventory, LinearSpec, get_weight
from amq.proxy.fisher import FISHER, RUNS, Captured, Errors, Pass, Scores, squares
from amq.proxy.resident import BankReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SALIENCE_PASSES = 4
See = Callable[[LinearSpec, str, Tensor], None]
"""Called with (linear, format, g · δW x [positions, out_features]) of every pass."""
Part = tuple[str, "Tensor | None", str]
"""(weight, int64 row indices or None for all of its rows, format)."""


@dataclass(frozen=True)
class RowBlocks:
    """rows: {linear: int64 row indices of each block}; costs: {linear: {format: nats per token of each block}}."""

    rows: Mapping[str, tuple[Tensor, ...]]
    costs: Mapping[str, Mapping[str, list[float]]]


def score_rows(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    formats: Sequence[str],
    seed: int,
    blocks: int,
    unscored: int = 0,
    runs: Sequence[int] = RUNS,
    memory: int = 256 << 20,
) -> RowBlocks:
    """The blocks of every linear of `inventory`, which has linears alone, in each of `formats`, cheapest first.

    model: full-precision. windows: int64 [passes, length]. Other arguments as for `fisher.fisher_passes`.
    """
    of = (model, inventory, bank, tuple(formats), unscored, memory, tuple(runs))
    middle, scored = formats[len(formats) // 2], windows.shape[1] - unscored
    salience: dict[str, Tensor] = {}

    def add_salience(spec: LinearSpec, fmt: str, change: Tensor) -> None:
        if fmt == middle:
            salience[spec.name] = salience.get(spec.name, 0) + change.square().sum(0)

    _sweep(add_salience, windows[:SALIENCE_PASSES], seed, of)
    rows = {n: torch.argsort(s, descending=True).chunk(blocks) for n, s in salience.items()}
    costs = {n: {fmt: [0.0] * len(parts) for fmt in formats} for n, parts in rows.items()}

    def add_cost(spec: LinearSpec, fmt: str, change: Tensor) -> None:
        for index, part in enumerate(rows[spec.name]):
            costs[spec.name][fmt][index] += squares(change[:, part].sum(1), runs) / scored / 8 / len(windows)

    _sweep(add_cost, windows, seed, of)
    return RowBlocks(rows, costs)


class _Seen(Scores):
    """Fisher passes that hand on what each output feature adds, instead of scoring."""

    def __init__(self, see: See, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._see = see

    @torch.no_grad()
    def _score_block(self, block: int, waiting: Sequence[tuple[Pass, Captured]]) -> None:
        for _, captured in waiting:
            for spec, x, g in captured:
                errors = Errors(self._bank, spec.name, get_weight(self._model, spec.name))
                for fmt in self._formats[spec.name]:
                    self._see(spec, fmt, (x.float() @ errors.get(fmt).t()).mul_(g))


def _sweep(see: See, windows: Tensor, seed: int, of: tuple[Any, ...]) -> None:
    for _ in _Seen(see, *of).passes(windows, seed, 0, (FISHER,)):
        pass


@contextmanager
def installed(model: PreTrainedModel, made: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """(weight, what to hold instead) in `model`, which is in memory whole; the own ones afterwards.

    `made` is run through once, each weight put in as it comes: it may be a generator that looks at the own ones. A tied
    embedding changes with its head.
    """
    kept: dict[str, Tensor] = {}
    try:
        for name, tensor in made:
            weight = get_weight(model, name)
            kept[name] = weight.data
            weight.data = tensor
        yield
    finally:
        for name, own in kept.items():
            get_weight(model, name).data = own


def assembled(model: PreTrainedModel, bank: BankReader, parts: Sequence[Part]) -> AbstractContextManager[None]:
    """Weights put together from `parts`, as `installed` has them. Parts of one weight are neighbours, and together have
    all of its rows."""
    return installed(model, _put_together(model, bank, parts))


@torch.no_grad()
def _put_together(model: PreTrainedModel, bank: BankReader, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    for name, own in groupby(parts, key=lambda part: part[0]):
        weight = get_weight(model, name)
        result, made = torch.empty_like(weight), dict[str, Tensor]()
        for _, rows, fmt in own:
            if fmt not in made:
                made[fmt] = torch.empty_like(weight)
                dequantize_into(bank.get(name, fmt), made[fmt])
            where = slice(None) if rows is None else rows
            result[where] = made[fmt][where]
        yield name, result
