"""Evaluator: configuration → loss, the mean divergence per token from the full-precision model.

One resident model, into which `LinearSwap` puts the linears whose format changes: dequantized, or as they are for the
kernels of a backend. The loss is streamed: final hidden states of
both models (a few MB) are kept, logits exist for `TOKENS` tokens at a time, and the reference log-probabilities are
cached only as far as `cache_memory` reaches and recomputed from the cached hidden states beyond that.

A linear's sensitivity (this linear in another format, all others as they are) reruns only the blocks from its own on,
from hidden states kept at that block's input; walking the linears in block order needs those of one block at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from amq.kernels.cpu import jensen_shannon
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import Inventory, embedding_weight
from amq.model.losses import LOSSES
from amq.model.open import LoadedModel
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import WeightBank

ROWS = 16
"""Tokens whose loss torch computes at once, so that its temporaries stay in the CPU's cache."""
BATCH_TOKENS = 1024
"""Tokens run through the blocks at once."""


class Evaluator:
    """Losses of configurations on fixed sets of token windows.

    windows: {name: int64 [windows, length]}, such as `search` and `confirm`.
    loss: `jsd`, `kl` or `ce` (see `amq.model.losses`).
    cache_memory: bytes that cached reference log-probabilities may take, over all window sets.
    backend, activations: what multiplies the candidates' linears; see `amq.proxy.swap`. The full-precision model,
        embedding and head are torch's.
    unscored: leading positions of every window that have no loss, `Corpus.unscored`.

    `seconds` is the time spent on losses since construction and `seconds_in_model` that part of it in the model's own
    forward (blocks, norm and head); the rest is dequantization and the loss itself, softmax included.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        inventory: Inventory,
        bank: WeightBank,
        windows: Mapping[str, Tensor],
        loss: str = "jsd",
        cache_memory: int = 256 << 20,
        backend: str = "reference",
        activations: str = "fp32",
        unscored: int = 0,
    ) -> None:
        LOSSES[loss]  # noqa: B018 - raises on an unknown name
        self._bank, self._unscored = bank, unscored
        self._runner = BlockRunner(loaded.model)
        self._swap = LinearSwap(loaded.model, (s.name for s in inventory.linears), backend, activations)
        self._blocks = {s.name: s.block for s in inventory.linears}
        device = embedding_weight(loaded.model).device
        self._token_losses = token_losses(loss, device)
        self._windows = {name: w.to(device) for name, w in windows.items()}
        self.seconds = self.seconds_in_model = 0.0
        with torch.no_grad():
            self._runner.check(next(iter(self._windows.values()))[:1, :32])
            self._reference = {name: self._final_hidden(w) for name, w in self._windows.items()}
            self._cache = self._cache_reference(cache_memory)
        self.seconds = self.seconds_in_model = 0.0  # without the reference's forwards above

    def evaluate(self, formats: Mapping[str, str], windows: str = "search") -> float:
        """Mean loss per scored token (nats) of a configuration {linear: format}.

        NaN or infinity where the model overflows.
        """
        start = time.perf_counter()
        with torch.no_grad():
            self.apply(formats)
            loss = self._mean_loss(self._final_hidden(self._windows[windows]), windows)
        self.seconds += time.perf_counter() - start
        return loss

    @torch.no_grad()  # as a decorator it is off between the steps of this generator
    def sensitivities(
        self, base: Mapping[str, str], changes: Iterable[tuple[tuple[str, ...], str]], windows: str = "search"
    ) -> Iterator[tuple[tuple[str, ...], str, float]]:
        """(weights, format, loss) for each (weights, format) in `changes`: weights of one block so, all others as in
        `base`."""
        tokens = self._batches(self._windows[windows])
        hidden: list[Tensor | None] = [None] * len(tokens)
        boundary = 0
        for names, fmt in sorted(changes, key=lambda change: self._blocks[change[0][0]]):
            start = time.perf_counter()
            self.apply(base)  # the caller may have applied something else since the last step
            block = self._blocks[names[0]]
            if block > boundary:
                hidden = [self._run(t, block, boundary, h) for t, h in zip(tokens, hidden, strict=True)]
                boundary = block
            self.apply({**base, **dict.fromkeys(names, fmt)})
            last = self._runner.n_blocks
            final = [self._run(t, last, boundary, h) for t, h in zip(tokens, hidden, strict=True)]
            loss = self._mean_loss(self._scored(final), windows)
            self.seconds += time.perf_counter() - start
            yield names, fmt, loss

    def apply(self, formats: Mapping[str, str]) -> None:
        """Puts the configuration's weights into the model, touching only linears whose format changes."""
        self._swap.apply(formats, self._bank)

    def restore(self) -> None:
        """Puts the full-precision weights back."""
        self._swap.restore()

    def full_precision(self) -> AbstractContextManager[None]:
        """The full-precision model inside, the configuration that was applied afterwards."""
        return self._swap.full_precision()

    def _batches(self, windows: Tensor) -> Sequence[Tensor]:
        return windows.split(max(1, BATCH_TOKENS // windows.shape[1]))

    def _run(self, tokens: Tensor, stop: int, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        begin = time.perf_counter()
        result = self._runner.hidden(tokens, stop, start, hidden)
        self.seconds_in_model += time.perf_counter() - begin
        return result

    def _final_hidden(self, windows: Tensor) -> Tensor:
        """[scored tokens, hidden_size] at the last block boundary."""
        return self._scored([self._run(t, self._runner.n_blocks) for t in self._batches(windows)])

    def _scored(self, batches: Sequence[Tensor]) -> Tensor:
        """Of hidden states [windows, length, hidden_size] those that have a loss, [tokens, hidden_size]."""
        return torch.cat([batch[:, self._unscored :].flatten(0, 1) for batch in batches])

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, vocabulary], contiguous."""
        begin = time.perf_counter()
        logits = self._runner.logits(hidden)
        self.seconds_in_model += time.perf_counter() - begin
        return logits.float().contiguous()

    def _cache_reference(self, cache_memory: int) -> dict[str, list[Tensor]]:
        """Reference log-probabilities of the first chunks of each window set, as many as fit."""
        cache: dict[str, list[Tensor]] = {}
        for name, hidden in self._reference.items():
            cache[name] = []
            for chunk in hidden.split(TOKENS):
                size = 4 * len(chunk) * self._runner.model.get_output_embeddings().weight.shape[0]
                if size > cache_memory:
                    break
                cache_memory -= size
                cache[name].append(self._logits(chunk).log_softmax(-1))
        return cache

    def _mean_loss(self, hidden: Tensor, windows: str) -> float:
        """hidden: the candidate's final hidden states [scored tokens, hidden_size]."""
        total = 0.0
        cached = self._cache[windows]
        chunks = zip(self._reference[windows].split(TOKENS), hidden.split(TOKENS), strict=True)
        for index, (reference, candidate) in enumerate(chunks):
            p = cached[index] if index < len(cached) else self._logits(reference).log_softmax(-1)
            total += float(self._token_losses(p, self._logits(candidate)).sum(dtype=torch.float64))
            if not math.isfinite(total):
                return total
        return total / len(hidden)


def token_losses(loss: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(reference log-probabilities, candidate logits), float32 [tokens, vocabulary] each → losses [tokens].

    `amq.model.losses` is the specification; on CPU the default loss has a fused kernel, which takes a fifth of
    torch's time.
    """
    if loss == "jsd" and device.type == "cpu":
        return jensen_shannon

    def by_torch(reference: Tensor, logits: Tensor) -> Tensor:
        pairs = zip(reference.split(ROWS), logits.split(ROWS), strict=True)
        return torch.cat([LOSSES[loss](p, x.log_softmax(-1)) for p, x in pairs])

    return by_torch
