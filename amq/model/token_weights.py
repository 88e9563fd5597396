"""How much calibration tokens, and rows, count for each linear: by what an error in its output does to the loss.

With labels drawn from the model's own next-token distribution and g[t] the gradient of their summed log-likelihood at
a linear's output for token t, an output error δ[t] costs ½ (g[t] · δ[t])² in expectation. A quantizer that looks at
rows one by one cannot use the direction of g[t], but its size: where second moments of inputs are weighted by ‖g[t]‖²,
what it minimises is Σ_t ‖g[t]‖² ‖δ[t]‖² (GuidedQuant, arXiv 2505.07004, does so for a few groups of rows each). Linears
that read one tensor share the sum of theirs, since they share its second moments. One that looks at rows together uses
E[g gᵀ] besides (`OutputMoments`).

Windows go through the model and back as in `amq.model.backward`.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.backward import drawn_likelihood, states_of_blocks, watch
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import EXPERT, Inventory, LinearSpec, embedding_weight
from amq.model.paging import holding, pager_of
from amq.model.states import StateStore
from amq.util.files import cache_dir, make_folder
from amq.util.temporary import temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MOST_OUTPUTS = 8192
"""Beyond it second moments of outputs are not made: they would take more than 256 MiB, and as much time as all else."""
TOGETHER = 4
"""Windows that go through a model in memory together; all, where the model is read from disk twice for them."""


class OutputMoments:
    """Σ g gᵀ of linears' outputs, float32 [out_features, out_features] each, in files that go with `close`, or when
    nobody holds it any more. Raises AmqError where the disk has no room for them.

    Experts, whose tokens differ, and linears of more than `MOST_OUTPUTS` outputs have none.
    """

    def __init__(self, linears: Iterable[LinearSpec]) -> None:
        wanted = [s for s in linears if s.kind != EXPERT]
        self._names = {s.name for s in wanted if s.out_features <= MOST_OUTPUTS}
        if len(self._names) < len(wanted):
            log.warning(
                "%d linears have more than %d outputs: their rows are rounded each by itself",
                len(wanted) - len(self._names), MOST_OUTPUTS,
            )  # fmt: skip
        needed, place = sum(4 * s.out_features**2 for s in wanted if s.name in self._names), cache_dir()
        make_folder(place)
        if (free := shutil.disk_usage(place).free) < needed:
            raise AmqError(
                f"second moments of gradients take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} are free at "
                f"{place}: free some space, or point AMQ_CACHE at a larger disk"
            )
        closing = ExitStack()
        self._folder = closing.enter_context(temporary_folder(place / "output_moments"))
        self.close = weakref.finalize(self, closing.close)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradients: Tensor) -> None:
        """gradients: [tokens, out_features]."""
        if name in self._names:
            g = gradients.float()
            self._sums[name] = torch.addmm(self._sums[name], g.t(), g) if name in self._sums else g.t() @ g

    def end_block(self) -> None:
        """No more gradients of what was added so far will come."""
        for name, total in self._sums.items():
            np.save(self._path(name), total.cpu().numpy())
        self._sums.clear()

    def get(self, name: str) -> Tensor | None:
        """None for a linear that has none, or that no gradient reached."""
        path = self._path(name)
        return torch.from_numpy(np.load(path)) if path.is_file() else None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


@torch.no_grad()
def token_weights(
    model: PreTrainedModel,
    inventory: Inventory,
    windows: Tensor,
    seed: int = 0,
    memory: int = 256 << 20,
    outputs: OutputMoments | None = None,
) -> dict[str, Tensor]:
    """{linear: float32 [windows, length], mean 1}, the same for linears that read one tensor.

    model: full-precision causal LM. windows: int64 [windows, length]; labels of window i depend on `seed` and i only.
    memory: bytes of hidden states that stay in memory. outputs: is filled; then all windows go back together.
    Experts, whose tokens differ, and linears that no gradient reaches are not in it: their tokens count alike.
    """
    runner, device = BlockRunner(model), embedding_weight(model).device
    runner.check(windows[:1, :32].to(device))
    linears = [[s for s in inventory.in_block(b) if s.kind != EXPERT] for b in range(runner.n_blocks)]
    found = {s.name: torch.zeros(windows.shape, device=device) for block in linears for s in block}
    together = len(windows) if pager_of(model) is not None or outputs is not None else TOGETHER
    for first in range(0, len(windows), together):
        tokens = [w.unsqueeze(0).to(device) for w in windows[first : first + together]]
        with StateStore(memory) as store:
            gradients = _to_the_end(runner, tokens, store, seed * 1_000_003 + first)
            for block in reversed(range(runner.n_blocks)):
                with holding(model, block):
                    for i, one in enumerate(tokens):
                        entry = store.pop((i, block)) if block else None
                        gradients[i], seen = _back(runner, linears[block], one, block, entry, gradients[i], outputs)
                        for name, weights in seen.items():
                            found[name][first + i] = weights
                if outputs is not None:
                    outputs.end_block()
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
    outputs: OutputMoments | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the gradient before the block, {linear: Σ ‖g[t]‖² of all that read its input, [length]}); adds to `outputs`."""
    with torch.enable_grad(), ExitStack() as hooks:
        ran = watch(runner.model, linears, hooks)
        entry = None if entry is None else entry.detach().requires_grad_()
        result = runner.hidden(tokens, block + 1, block, entry)
        wanted = [output for *_, output in ran] + ([] if entry is None else [entry])
        found = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    sums: dict[tuple[int, torch.Size], Tensor] = {}
    for (spec, x, _), g in zip(ran, found, strict=False):
        if g is not None and outputs is not None:
            outputs.add(spec.name, g.flatten(0, -2))
        if g is not None and g[..., 0].numel() == tokens.numel():
            energy = g.float().square().sum(-1).flatten()
            sums[_key(x)] = sums[_key(x)] + energy if _key(x) in sums else energy
    weights = {spec.name: sums[_key(x)] for spec, x, _ in ran if _key(x) in sums}
    return gradient if entry is None else found[-1], weights


def _key(x: Tensor) -> tuple[int, torch.Size]:
    """Of one tensor, as long as all are alive."""
    return x.data_ptr(), x.shape
