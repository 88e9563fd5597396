"""Errors of what each linear gives, from one forward: two cost tables that know inputs, and no loss.

With x[t] the full-precision inputs of a linear on T tokens, δW its error in a format, y = W x and e = δW x, per output
feature n:

    activation   Σ_t ‖e[t]‖² / Σ_t ‖y[t]‖²  =  tr(δW H δWᵀ) / tr(W H Wᵀ),  H = E[x xᵀ]
    entropy      Σ_n ( ½ log2(2πe σ²[n]) − max(0, −½ log2(D[n] / σ²[n])) ),  σ² the variance of y[n], D = E[e[n]²]

The first is what GPTQ minimises and what OWQ ranks columns by (arXiv 2306.02272), here relative to the output's energy
so that linears compare. The second takes outputs for Gaussian: their entropy less the information that is left of them
behind an error of that size (rate–distortion), in bits per token. Position 0 of a window counts like any other.

Blocks are run one after the other, as a model that is read from disk wants it; every error is dequantized once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amq.model.backward import watch
from amq.model.blocks import BlockRunner
from amq.model.inventory import Inventory, embedding_weight, get_weight
from amq.model.paging import holding
from amq.model.states import StateStore
from amq.proxy.fisher import Errors, Table
from amq.proxy.resident import BankReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 1e-12
"""Of an error relative to its output: what is exact would have infinite information."""


@dataclass(frozen=True)
class OutputErrors:
    """Of one linear, float64 [out_features] each: mean square and variance of its outputs (bias left out), and by
    format the mean square of their errors. features: mean square of each input, float64 [in_features]."""

    energy: Tensor
    variance: Tensor
    error: Mapping[str, Tensor]
    features: Tensor

    def activation(self, fmt: str) -> float:
        """Energy of the errors over that of the outputs; 0 for outputs that are nothing."""
        whole = float(self.energy.sum())
        return float(self.error[fmt].sum()) / whole if whole else 0.0

    def entropy(self, fmt: str) -> float:
        """Bits per token; of features that never vary nothing."""
        vary = self.variance > 0
        variance = self.variance[vary]
        relative = (self.error[fmt][vary] / variance).clamp_min(LEAST)
        known = (-0.5 * relative.log2()).clamp_min(0.0)
        return float((0.5 * (2 * math.pi * math.e * variance).log2() - known).sum())


def tables(found: Mapping[str, OutputErrors]) -> tuple[Table, Table]:
    """The cost tables `activation` and `entropy`."""
    activation = {name: {fmt: own.activation(fmt) for fmt in own.error} for name, own in found.items()}
    entropy = {name: {fmt: own.entropy(fmt) for fmt in own.error} for name, own in found.items()}
    return activation, entropy


@torch.no_grad()
def output_errors(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    formats: Sequence[str],
    memory: int = 256 << 20,
) -> dict[str, OutputErrors]:
    """Of every linear of the inventory's blocks, in those of `formats` that the bank has it in.

    model: full-precision causal LM. windows: int64 [n, length]. memory: bytes that hidden states may take in memory.
    A linear that no token reaches (an expert) has zeros.
    """
    runner, device = BlockRunner(model), embedding_weight(model).device
    tokens = [window.to(device) for window in windows.split(1)]
    found: dict[str, OutputErrors] = {}
    with StateStore(memory) as store:
        for block in range(runner.n_blocks):
            with holding(model, block):
                seen = _inputs(runner, inventory, block, tokens, store)
                for spec in inventory.in_block(block):
                    known = {f.name for f in bank.formats_of(spec.name)}
                    errors = Errors(bank, spec.name, get_weight(model, spec.name))
                    wanted = [fmt for fmt in formats if fmt in known]
                    found[spec.name] = _measure(seen.get(spec.name), get_weight(model, spec.name), errors, wanted)
    return found


def _inputs(
    runner: BlockRunner, inventory: Inventory, block: int, tokens: Sequence[Tensor], store: StateStore
) -> dict[str, _Inputs]:
    """{linear: what it reads}, of those that read something; moves the states in `store` behind the block."""
    seen: dict[str, list[Tensor]] = {}
    for index, window in enumerate(tokens):
        with ExitStack() as hooks:
            ran = watch(runner.model, inventory.in_block(block), hooks)
            state = store.pop(index) if block else None
            store.put(index, runner.hidden(window, block + 1, block, state))
        for spec, x, _ in ran:
            seen.setdefault(spec.name, []).append(x.flatten(0, -2))
    made: dict[tuple[int, ...], _Inputs] = {}  # linears that share an input share its matrix
    found = {}
    for name, windows in seen.items():
        if not sum(len(x) for x in windows):
            continue  # an expert that no token reaches
        key = tuple(x.data_ptr() for x in windows)
        found[name] = made[key] = made.get(key) or _Inputs(windows)
    return found


class _Inputs:
    """What a linear read, [rows, in_features] of each window: mean squares and means of what a matrix makes of it.

    By E[x xᵀ] where there are more rows than features, which is that many times less to multiply.
    """

    def __init__(self, windows: Sequence[Tensor]) -> None:
        self.rows = sum(len(x) for x in windows)
        self._windows = [x.float() for x in windows]
        self._gram: Tensor | None = None
        if self.rows > windows[0].shape[1]:
            self._gram = torch.stack([x.t() @ x for x in self._windows]).sum(0) / self.rows
        self._mean = torch.stack([x.sum(0, dtype=torch.float64) for x in self._windows]).sum(0) / self.rows

    @property
    def features(self) -> Tensor:
        """Mean squares of the features, float64 [in_features]."""
        sums = [x.square().sum(0, dtype=torch.float64) for x in self._windows]
        return (torch.stack(sums).sum(0) / self.rows).cpu()

    def squares(self, matrix: Tensor) -> Tensor:
        """Mean squares of matrix · x, float64 [out_features]; matrix: float32 [out_features, in_features]."""
        if self._gram is not None:
            return ((matrix @ self._gram).mul_(matrix)).sum(1, dtype=torch.float64).clamp_min(0.0).cpu()
        sums = [(x @ matrix.t()).square_().sum(0, dtype=torch.float64) for x in self._windows]
        return (torch.stack(sums).sum(0) / self.rows).cpu()

    def means(self, matrix: Tensor) -> Tensor:
        """Means of the same."""
        return (matrix.double() @ self._mean).cpu()


def _measure(inputs: _Inputs | None, weight: Tensor, errors: Errors, formats: Sequence[str]) -> OutputErrors:
    if inputs is None:
        zeros, none = (torch.zeros(n, dtype=torch.float64) for n in weight.shape)
        return OutputErrors(zeros, zeros, dict.fromkeys(formats, zeros), none)
    energy = inputs.squares(weight.float())
    variance = (energy - inputs.means(weight) ** 2).clamp_min(0.0)
    return OutputErrors(energy, variance, {fmt: inputs.squares(errors.get(fmt)) for fmt in formats}, inputs.features)
