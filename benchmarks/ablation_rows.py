"""Row blocks as variables of the knapsack (as in MixLLM), at the level of the bank: what finer allocation would gain.

The output rows of every linear are sorted by salience Σ_t g_n² · (δW x)_n² and split into blocks of equal count, each
with a format of its own. No kernel runs that: the weights are put together from the bank's, dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.kernels.dense import dequantize_into
from amq.model.inventory import LinearSpec, embedding_weight, get_weight
from amq.model.states import StateStore
from amq.proxy.fisher import Captured, _Errors, _Pass, _Scores, squares
from amq.search.knapsack import select
from amq.search.space import is_outer

SALIENCE_PASSES = 4
See = Callable[[LinearSpec, str, Tensor], None]
"""Called with (linear, format, g · δW x [positions, out_features]) of every pass."""


class _Seen(_Scores):
    """Fisher passes that hand on what each output feature adds, instead of scoring."""

    def __init__(self, see: See, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._see = see

    @torch.no_grad()
    def _score_block(self, block: int, waiting: Sequence[tuple[_Pass, Captured]]) -> None:
        for _, captured in waiting:
            for spec, x, g in captured:
                errors = _Errors(self._bank, spec.name, get_weight(self._model, spec.name))
                for fmt in self._formats[spec.name]:
                    self._see(spec, fmt, (x.float() @ errors.get(fmt).t()).mul_(g))


class RowBlocks:
    """The blocks of every linear of a stage of `amq.search.run`, in memory whole, and their scores.

    runs: of positions, as in the scores of whole linears. blocks: per linear. The model is in full precision meanwhile.
    """

    def __init__(self, stage: Any, seed: int, runs: tuple[int, ...], blocks: int) -> None:
        self._stage, self._space = stage, stage.space
        self._linears = [v[0] for v in self._space.variables if not is_outer(v[0])]
        assert all(len(v) == 1 for v in self._space.variables), "tied linears have no rows of their own"
        formats = self._space.format_names
        salience: dict[str, Tensor] = {}

        def add_salience(spec: LinearSpec, fmt: str, change: Tensor) -> None:
            if fmt == formats[len(formats) // 2]:
                salience[spec.name] = salience.get(spec.name, 0) + change.square().sum(0)

        self._sweep(add_salience, stage.cost_windows[:SALIENCE_PASSES], seed, runs)
        self._blocks = {n: torch.argsort(s, descending=True).chunk(blocks) for n, s in salience.items()}
        self._costs = {s.name: np.zeros((blocks, len(formats))) for s in self._linears}
        scored = stage.cost_windows.shape[1] - stage.corpus.unscored

        def add_cost(spec: LinearSpec, fmt: str, change: Tensor) -> None:
            for index, rows in enumerate(self._blocks[spec.name]):
                score = squares(change[:, rows].sum(1), runs) / scored / 8 / len(stage.cost_windows)
                self._costs[spec.name][index, formats.index(fmt)] += score

        self._sweep(add_cost, stage.cost_windows, seed, runs)

    def _sweep(self, see: See, windows: Tensor, seed: int, runs: tuple[int, ...]) -> None:
        stage, memory = self._stage, 256 << 20
        device = embedding_weight(stage.opened.model).device
        inventory = stage.quantized.only({s.name for s in self._linears})
        formats, unscored = self._space.format_names, stage.corpus.unscored
        scores = _Seen(see, stage.opened.model, inventory, stage.near, formats, unscored, memory, runs)
        for index, window in enumerate(windows.split(1)):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            with StateStore(memory) as store:
                scores.run([_Pass(window.to(device), generator)], store)

    def put(self, costs: np.ndarray, capacity: float) -> int:
        """Solves the knapsack over blocks of rows, head and embeddings as they are, and puts its choice into the model;
        returns the bytes that it takes.

        costs: of whole variables, [n_variables, n_formats]; of them those of head and embeddings count.
        """
        formats, all_costs, all_sizes, owner = self._space.format_names, [], [], []
        for variable, whole, sizes in zip(self._space.variables, costs, self._space.sizes, strict=True):
            spec = variable[0]
            if is_outer(spec):
                all_costs, all_sizes, owner = [*all_costs, whole], [*all_sizes, sizes], [*owner, (spec, None)]
                continue
            for index, rows in enumerate(self._blocks[spec.name]):
                row = np.full_like(whole, np.inf)
                row[: len(formats)] = self._costs[spec.name][index]
                all_costs, owner = [*all_costs, row], [*owner, (spec, rows)]
                all_sizes.append(sizes * len(rows) // spec.out_features)
        sizes = np.array(all_sizes)
        point = select(np.array(all_costs), sizes, capacity)
        choices = dict(zip((v[0].name for v in self._space.variables), self._space.choices, strict=True))
        self._install([(spec, rows, choices[spec.name][i].name) for (spec, rows), i in zip(owner, point, strict=True)])
        return int(sizes[np.arange(len(point)), point].sum())

    @torch.no_grad()
    def _install(self, chosen: Sequence[tuple[LinearSpec, Tensor | None, str]]) -> None:
        whole = {s.name: self._space.format_names[-1] for s in self._linears}
        whole |= {spec.name: fmt for spec, rows, fmt in chosen if rows is None}
        self._stage.evaluator.apply(whole)  # working buffers, which are written over
        buffer: dict[tuple[str, str], Tensor] = {}
        for spec, rows, fmt in chosen:
            if rows is None:
                continue
            weight = get_weight(self._stage.opened.model, spec.name)
            if (spec.name, fmt) not in buffer:
                buffer = {key: made for key, made in buffer.items() if key[0] == spec.name}
                buffer[spec.name, fmt] = torch.empty_like(weight)
                dequantize_into(self._stage.near.get(spec.name, fmt), buffer[spec.name, fmt])
            weight[rows] = buffer[spec.name, fmt][rows]

    def take_away(self) -> None:
        """The full-precision weights again; nothing made of the blocks is left."""
        self._stage.evaluator._swap.release([s.name for s in self._space.weights])
