"""The divergence of a quantized model from what it was in full precision, on given windows, and its gradients.

Of the full-precision model the hidden states behind the last block are kept, a few MB each, and what stands between
them and the logits, as far as it is going to change: norm and head. Its logits are made again for every loss, `TOKENS`
tokens at a time, beside those of the quantized model, since a vocabulary is large.

A backward pass needs the activations of the blocks it goes through. Where memory does not hold those of all blocks, the
states between segments of them are kept instead, and each segment runs again when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from amq.model.blocks import TOKENS, BlockRunner
from amq.model.calibration import STATE_BYTES
from amq.model.inventory import embedding_weight
from amq.model.losses import kullback_leibler
from amq.model.states import StateStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Distillation:
    """KL(full precision ‖ model) per token, nats, of windows that `learn` saw while the model was in full precision.

    changing: names of parameters outside of the blocks that will change. unscored: leading positions of every window
    without a loss, `Corpus.unscored`. segments: parts of the blocks whose activations are held one at a time.
    """

    def __init__(self, model: PreTrainedModel, changing: Sequence[str], unscored: int, segments: int = 1) -> None:
        self._runner, self._unscored = BlockRunner(model), unscored
        blocks = self._runner.n_blocks
        self._cuts = [blocks * part // segments for part in range(segments + 1)]
        parameters = {name: model.get_parameter(name) for name in changing}
        self._kept = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
        self._windows: list[Tensor] = []
        self._final = StateStore(STATE_BYTES)

    @torch.no_grad()
    def learn(self, window: Tensor) -> int:
        """Keeps what the model makes of a window, int64 [length]; returns the window's number."""
        tokens = window.unsqueeze(0).to(embedding_weight(self._runner.model).device)
        self._final.put(len(self._windows), self._runner.hidden(tokens, self._runner.n_blocks))
        self._windows.append(tokens)
        return len(self._windows) - 1

    @torch.no_grad()
    def loss(self, windows: Sequence[int]) -> float:
        """The mean over all scored tokens of these windows."""
        last = self._runner.n_blocks
        losses = [self._divergence(w, self._runner.hidden(self._windows[w], last))[0] for w in windows]
        return sum(losses) / len(losses)

    def backward(self, window: int) -> float:
        """The mean over the scored tokens of one window; its gradients are added to those of the parameters."""
        tokens, states = self._windows[window], dict[int, Tensor]()
        with torch.no_grad():
            for start, stop in list(pairwise(self._cuts))[:-1]:
                states[stop] = self._runner.hidden(tokens, stop, start, states.get(start))
        loss, gradient = 0.0, None
        with torch.enable_grad():
            for start, stop in reversed(list(pairwise(self._cuts))):
                entry = states.pop(start).requires_grad_() if start else None
                state = self._runner.hidden(tokens, stop, start, entry)
                if gradient is None:
                    loss, gradient = self._divergence(window, state.detach(), True)
                if state.requires_grad:
                    state.backward(gradient)
                gradient = None if entry is None else entry.grad
        return loss

    def _divergence(self, window: int, final: Tensor, backward: bool = False) -> tuple[float, Tensor]:
        """(mean of the window's scored tokens, its gradient at `final`, zeros unless `backward`), where `final` is the
        state behind the last block, [1, length, hidden_size]; with `backward` norm and head get their gradients."""
        gradient, total = torch.zeros_like(final), 0.0
        expected, scored = self._final.get(window)[0, self._unscored :], final[0, self._unscored :]
        places = gradient[0, self._unscored :].split(TOKENS)
        for wanted, found, place in zip(expected.split(TOKENS), scored.split(TOKENS), places, strict=True):
            with torch.no_grad(), self._full_precision():
                reference = self._runner.logits(wanted).float().log_softmax(-1)
            with torch.set_grad_enabled(backward):
                found = found.detach().requires_grad_(backward)
                logits = self._runner.logits(found).float()
                loss = kullback_leibler(reference, logits.log_softmax(-1)).sum() / len(scored)
                if backward:
                    loss.backward()
                    place.copy_(found.grad)
            total += float(loss.detach())
        return total, gradient

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Norm and head as they were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, (parameter, kept) in enumerate(self._kept):
            self._kept[index] = (parameter, parameter.data)
            parameter.data = kept


def activation_bytes(model: PreTrainedModel, tokens: Tensor, parameters: Sequence[nn.Parameter]) -> int:
    """At most what autograd keeps of one pass of `tokens`, int64 [1, length], through all blocks, where `parameters`
    have gradients. Nothing of it is kept here."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = 0

    def count(tensor: Tensor) -> None:
        nonlocal size
        size += tensor.nbytes if tensor.untyped_storage().data_ptr() not in own else 0

    def refuse(_: None) -> Tensor:
        raise AssertionError("there is no backward pass")

    runner = BlockRunner(model)
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, refuse):
            runner.hidden(tokens, runner.n_blocks)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return size
