"""Format preferences learned by gradient: every linear is a mixture of its formats, whose shares are trained.

Each variable has one logit per format, p = softmax(logits), and each of its linears the weight W = Σ_f p_f Ŵ_f of the
bank's. A step takes one window, the divergence KL(full ‖ mixed) per token, and an augmented Lagrangian that holds the
expected size at a target:

    KL + λ c + ½ ρ c²,  c = Σ p_f bits_f − target (bits per weight),  λ ← λ + η ρ c after the step

and Adam moves the logits. What they end as is a cost table, −ln p, which the knapsack reads for any budget, as GAMMA
does with its preferences (arXiv 2605.18475); DNAS (arXiv 1812.00090) draws formats from such logits.
Only the logits are trained. As in `amq.proxy.fisher`, a window goes forward block by block without a graph, and back
with the graph of one block at a time, so mixed weights and their gradients exist for one block only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.kernels.dense import dequantize_into
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import Inventory, LinearSpec, embedding_weight, get_linear
from amq.model.states import StateStore
from amq.proxy.fisher import Table
from amq.proxy.resident import BankReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

RATE, PENALTY, DUAL = 0.1, 1.0, 0.1
"""Adam's step on logits, ρ per square of a bit per weight, and η: with 1 the size of a tiny model swings from 3.1 to
4.5 bits around a target of 3.5 for all of 60 steps, with 0.1 it ends there. None is tuned for the loss."""


@dataclass(frozen=True)
class Shares:
    """What is learned for. variables: the linears of each, tied ones together. formats: those of all, cheapest first.

    sizes: float64 [n_variables, n_formats], bits of each choice over all weights, so that chosen ones add up to bits
    per weight. fixed: bits per weight of what has no choice, in the same unit. target: bits per weight to hold.
    """

    variables: Sequence[Sequence[LinearSpec]]
    formats: Sequence[str]
    sizes: Tensor
    fixed: float
    target: float


def learn(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    shares: Shares,
    steps: int,
    unscored: int = 0,
    memory: int = 256 << 20,
    step: Callable[[str], Any] = lambda note: None,
) -> Table:
    """{linear: {format: −ln p}}, spread over tied linears in equal parts, after `steps` steps.

    model: full-precision, in memory whole. windows: int64 [n, length], taken in turn. Linears of the inventory that are
    in no variable stay in full precision. unscored, memory: as for `fisher_passes`. step: called with a note per step.
    """
    trainer = _Trainer(model, inventory, bank, shares, unscored, memory)
    tokens = [window.to(embedding_weight(model).device) for window in windows.split(1)]
    reference = [trainer.final(window) for window in tokens]
    logits = torch.zeros(shares.sizes.shape, dtype=torch.float64, requires_grad=True)
    adam, multiplier = torch.optim.Adam([logits], lr=RATE), 0.0
    for number in range(steps):
        index = number % len(tokens)
        p = logits.softmax(-1)
        loss, slopes = trainer.step(tokens[index], reference[index], p.detach())
        excess = (p * shares.sizes).sum() + shares.fixed - shares.target
        adam.zero_grad()
        ((p * slopes).sum() + multiplier * excess + 0.5 * PENALTY * excess**2).backward()
        adam.step()
        multiplier += DUAL * PENALTY * float(excess.detach())
        step(f"divergence {loss:.4f}, {float(excess.detach()) + shares.target:.3f} bits")
    costs = -logits.detach().log_softmax(-1)
    return {
        spec.name: {fmt: float(costs[i, j]) / len(members) for j, fmt in enumerate(shares.formats)}
        for i, members in enumerate(shares.variables)
        for spec in members
    }


class _Trainer:
    """Divergence of the mixed model on one window, and its slope along every share."""

    def __init__(
        self, model: PreTrainedModel, inventory: Inventory, bank: BankReader, shares: Shares, unscored: int, memory: int
    ) -> None:
        self._model, self._runner, self._bank, self._shares = model, BlockRunner(model), bank, shares
        self._unscored, self._memory = unscored, memory
        self._of = {spec.name: i for i, members in enumerate(shares.variables) for spec in members}
        names = self._of.keys()
        self._blocks = [
            [s for s in inventory.in_block(b) if s.name in names] for b in range(self._runner.n_blocks)
        ]  # fmt: skip

    @torch.no_grad()
    def final(self, tokens: Tensor) -> Tensor:
        """Final hidden states of the full-precision model, [length, hidden_size]."""
        return self._runner.hidden(tokens, self._runner.n_blocks)[0]

    def step(self, tokens: Tensor, reference: Tensor, p: Tensor) -> tuple[float, Tensor]:
        """(KL in nats per scored token, its gradient by p [n_variables, n_formats]); p: float64."""
        slopes = torch.zeros_like(p)
        with StateStore(self._memory) as store:
            for block in range(self._runner.n_blocks):
                with torch.no_grad(), self._mixed(block, p):
                    state = store.get(block) if block else None
                    store.put(block + 1, self._runner.hidden(tokens, block + 1, block, state))
            loss, gradient = self._loss(store.pop(self._runner.n_blocks)[0], reference)
            for block in reversed(range(self._runner.n_blocks)):
                gradient = self._back(tokens, block, store.pop(block) if block else None, gradient, p, slopes)
        return loss, slopes

    def _loss(self, final: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        """(loss, gradient at the final states [1, length, hidden_size])."""
        hidden = final[self._unscored :].split(TOKENS)
        wanted = reference[self._unscored :].split(TOKENS)
        count, total, gradients = len(final) - self._unscored, 0.0, [torch.zeros_like(final[: self._unscored])]
        for chunk, full in zip(hidden, wanted, strict=True):
            with torch.no_grad():
                target = self._runner.logits(full).float().log_softmax(-1)
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                mixed = self._runner.logits(leaf).float().log_softmax(-1)
                loss = torch.nn.functional.kl_div(mixed, target, log_target=True, reduction="sum") / count
                (gradient,) = torch.autograd.grad(loss, leaf)
            total += float(loss.detach())
            gradients.append(gradient)
        return total, torch.cat(gradients).unsqueeze(0)

    def _back(
        self, tokens: Tensor, block: int, entry: Tensor | None, gradient: Tensor, p: Tensor, slopes: Tensor
    ) -> Tensor:
        """The gradient before the block; adds to `slopes` what its linears' shares have."""
        specs = self._blocks[block]
        with self._mixed(block, p), torch.enable_grad():
            weights = [get_linear(self._model, s.name).weight for s in specs]
            for weight in weights:
                weight.requires_grad_()
            entry = None if entry is None else entry.detach().requires_grad_()
            wanted = weights + ([] if entry is None else [entry])
            result = self._runner.hidden(tokens, block + 1, block, entry)
            found = torch.autograd.grad(result, wanted, gradient, allow_unused=True) if wanted else ()
            for weight in weights:
                weight.requires_grad_(False)
        with torch.no_grad():
            for spec, weight, slope in zip(specs, weights, found, strict=False):
                if slope is not None:
                    for j, made in self._formats(spec, weight):
                        slopes[self._of[spec.name], j] += float((made * slope).sum(dtype=torch.float64))
        return gradient if entry is None else found[-1]

    def _formats(self, spec: LinearSpec, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number of the format, its weight), each written over the one before."""
        buffer = torch.empty_like(like)
        for j, fmt in enumerate(self._shares.formats):
            dequantize_into(self._bank.get(spec.name, fmt), buffer)
            yield j, buffer

    @contextmanager
    def _mixed(self, block: int, p: Tensor) -> Iterator[None]:
        """The block's linears with their mixtures for weights inside, their own ones afterwards."""
        kept: list[tuple[Any, Tensor]] = []
        try:
            with torch.no_grad():
                for spec in self._blocks[block]:
                    weight = get_linear(self._model, spec.name).weight
                    kept.append((weight, weight.data))
                    mixture = torch.zeros_like(weight)
                    for j, made in self._formats(spec, weight):
                        mixture.add_(made, alpha=float(p[self._of[spec.name], j]))
                    weight.data = mixture
            yield
        finally:
            for weight, own in kept:
                weight.data = own
