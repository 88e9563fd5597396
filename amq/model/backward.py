"""Gradients of a model block by block, whose weights need none: what a score of linears and a weight of tokens share.

Windows go through the model together, block by block: once without a graph, keeping the hidden state after every block
(`states_of_blocks`), and then back, rebuilding one block's graph at a time, in which `watch` keeps what its linears
read and wrote. What is differentiated is the likelihood of labels that the model draws itself (`drawn_likelihood`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from amq.model.blocks import BlockRunner
from amq.model.inventory import LinearSpec, get_linear
from amq.model.paging import holding
from amq.model.states import StateStore

Ran = tuple[LinearSpec, Tensor, Tensor]
"""(linear, its input, its output), once for each time that it ran."""


@torch.no_grad()
def states_of_blocks(runner: BlockRunner, windows: Sequence[Tensor], store: StateStore) -> None:
    """Leaves the state at boundary b ≥ 1 of window i, int64 [1, length], in the store under (i, b)."""
    for block in range(runner.n_blocks):
        with holding(runner.model, block):
            for index, tokens in enumerate(windows):
                state = store.get((index, block)) if block else None
                store.put((index, block + 1), runner.hidden(tokens, block + 1, block, state))


def drawn_likelihood(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Σ_t ln p(y_t), y_t ~ p. log_probabilities: float32 [tokens, vocabulary]."""
    labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
    return log_probabilities.gather(1, labels).sum()


def watch(model: nn.Module, linears: Sequence[LinearSpec], hooks: ExitStack) -> list[Ran]:
    """What these linears read, without a graph, and wrote, with one: filled as they run, until `hooks` are closed."""
    ran: list[Ran] = []

    def keep(spec: LinearSpec, x: Tensor, output: Tensor) -> None:
        # Where nothing before needs gradients (block 0), the first linears' outputs become the leaves.
        ran.append((spec, x.detach(), output if output.requires_grad else output.requires_grad_()))

    for spec in linears:
        module = get_linear(model, spec.name)
        hooks.callback(module.register_forward_hook(lambda m, args, out, s=spec: keep(s, args[0], out)).remove)
    return ran
