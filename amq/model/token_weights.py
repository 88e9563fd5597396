"""How much each calibration token counts for each linear: by what an error in its output there does to the loss.

With labels drawn from the model's own next-token distribution and g[t] the gradient of their summed log-likelihood at
a linear's output for token t, an output error δ[t] costs ½ (g[t] · δ[t])² in expectation. A quantizer that looks at
rows one by one cannot use the direction of g[t], but its size: where second moments of inputs are weighted by ‖g[t]‖²,
what it minimises is Σ_t ‖g[t]‖² ‖δ[t]‖² (GuidedQuant, arXiv 2505.07004, does so for a few groups of rows each). Linears
that read one tensor share the sum of theirs, since they share its second moments.

Windows go through the model and back as in `amq.model.backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amq.model.backward import drawn_likelihood, states_of_blocks, watch
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import EXPERT, Inventory, LinearSpec, embedding_weight
from amq.model.paging import holding, pager_of
from amq.model.states import StateStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOGETHER = 4
"""Windows that go through a model in memory together; all, where the model is read from disk twice for them."""


@torch.no_grad()
def token_weights(
    model: PreTrainedModel, inventory: Inventory, windows: Tensor, seed: int = 0, memory: int = 256 << 20
) -> dict[str, Tensor]:
    """{linear: float32 [windows, length], mean 1}, the same for linears that read one tensor.

    model: full-precision causal LM. windows: int64 [windows, length]; labels of window i depend on `seed` and i only.
    memory: bytes of hidden states that stay in memory.
    Experts, whose tokens differ, and linears that no gradient reaches are not in it: their tokens count alike.
    """
    runner, device = BlockRunner(model), embedding_weight(model).device
    runner.check(windows[:1, :32].to(device))
    linears = [[s for s in inventory.in_block(b) if s.kind != EXPERT] for b in range(runner.n_blocks)]
    found = {s.name: torch.zeros(windows.shape, device=device) for block in linears for s in block}
    together = len(windows) if pager_of(model) is not None else TOGETHER
    for first in range(0, len(windows), together):
        tokens = [w.unsqueeze(0).to(device) for w in windows[first : first + together]]
        with StateStore(memory) as store:
            gradients = _to_the_end(runner, tokens, store, seed * 1_000_003 + first)
            for block in reversed(range(runner.n_blocks)):
                with holding(model, block):
                    for i, one in enumerate(tokens):
                        entry = store.pop((i, block)) if block else None
                        gradients[i], seen = _back(runner, linears[block], one, block, entry, gradients[i])
                        for name, weights in seen.items():
                            found[name][first + i] = weights
    return {name: w / w.mean() for name, w in found.items() if bool(w.any())}


def _to_the_end(runner: BlockRunner, tokens: Sequence[Tensor], store: StateStore, seed: int) -> list[Tensor]:
    """The gradients at the last boundary, [1, length, hidden_size] each; leaves the states before it in the store.
    Window i draws its labels with the seed `seed` + i."""
    states_of_blocks(runner, tokens, store)
    gradients = []
    for i in range(len(tokens)):
        final = store.pop((i, runner.n_blocks))[0]
        generator = torch.Generator(final.device).manual_seed(seed + i)
        gradients.append(torch.cat([_of_labels(runner, c, generator) for c in final.split(TOKENS)]).unsqueeze(0))
    return gradients


def _of_labels(runner: BlockRunner, states: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of Σ_t ln p(y_t), y_t ~ p, at final hidden states [tokens, hidden_size]."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        likelihood = drawn_likelihood(runner.logits(states).float().log_softmax(-1), generator)
        (gradient,) = torch.autograd.grad(likelihood, states)
    return gradient


def _back(
    runner: BlockRunner,
    linears: Sequence[LinearSpec],
    tokens: Tensor,
    block: int,
    entry: Tensor | None,
    gradient: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the gradient before the block, {linear: Σ ‖g[t]‖² of all that read its input, [length]})."""
    with torch.enable_grad(), ExitStack() as hooks:
        ran = watch(runner.model, linears, hooks)
        entry = None if entry is None else entry.detach().requires_grad_()
        result = runner.hidden(tokens, block + 1, block, entry)
        wanted = [output for *_, output in ran] + ([] if entry is None else [entry])
        found = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    sums: dict[tuple[int, torch.Size], Tensor] = {}
    for (_, x, _), g in zip(ran, found, strict=False):
        if g is not None and g[..., 0].numel() == tokens.numel():
            energy = g.float().square().sum(-1).flatten()
            sums[_key(x)] = sums[_key(x)] + energy if _key(x) in sums else energy
    weights = {spec.name: sums[_key(x)] for spec, x, _ in ran if _key(x) in sums}
    return gradient if entry is None else found[-1], weights


def _key(x: Tensor) -> tuple[int, torch.Size]:
    """Of one tensor, as long as all are alive."""
    return x.data_ptr(), x.shape
