"""Meter: final hidden states of configurations → losses against the full-precision model.

The loss is streamed: hidden states (a few MB each) are kept, logits exist for `chunk_tokens` at a time, and what a
measure compares them with (of a divergence the reference log-probabilities) is cached only as far as memory for it
reaches and recomputed from the full-precision model's hidden states and head beyond that, once for all candidates that
are measured together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from amq.formats import KEPT
from amq.kernels.cpu import jensen_shannon
from amq.model.blocks import TOKENS
from amq.model.losses import LOSSES
from amq.util.limits import free_on

ROWS = 16
"""Tokens whose loss torch computes at once on a CPU, so that its temporaries stay in the cache."""
SHARE, MOST_TOKENS = 8, 4096
"""Of the free memory of another device an eighth is for logits, and another for what their losses take."""
LOGITS_BYTES, LOSS_BYTES = 16, 48
"""For each token and entry of the vocabulary: the reference's and the candidate's, as they come and as float32; and a
dozen float32 that the divergence is computed with."""

Logits = Callable[[Tensor, str], Tensor]
"""(final hidden states [tokens, hidden_size], format of the head) → float32 [tokens, vocabulary], contiguous."""


class Measure(Protocol):
    """What a loss is: of every scored token, and of a window set as a whole."""

    def of_reference(self, windows: str, rows: slice, logits: Tensor) -> Tensor:
        """What candidates are compared with at the scored tokens `rows` of a window set.

        logits: float32 [tokens, vocabulary], of the full-precision model.
        """
        ...

    def of_tokens(self, windows: str, rows: slice, reference: Tensor, logits: Tensor) -> Tensor:
        """[tokens] of the scored tokens `rows` of a window set.

        reference: from `of_reference`. logits: float32 [tokens, vocabulary], of a candidate; they may be changed.
        """
        ...

    def of_windows(self, windows: str, tokens: Tensor) -> float:
        """tokens: what `of_tokens` gave for all scored tokens of the set, in order."""
        ...


class Divergence:
    """A `Measure`: the mean over tokens of a divergence of `amq.model.losses`, in nats."""

    def __init__(self, loss: str, device: torch.device, rows: int = ROWS) -> None:
        self._of = (device, rows)
        self._token_losses = token_losses(loss, device, rows)

    def by(self, loss: str) -> Divergence:
        """Another divergence from the same reference."""
        return Divergence(loss, *self._of)

    def of_reference(self, windows: str, rows: slice, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)

    def of_tokens(self, windows: str, rows: slice, reference: Tensor, logits: Tensor) -> Tensor:
        return self._token_losses(reference, logits)

    def of_windows(self, windows: str, tokens: Tensor) -> float:
        return float(tokens.sum(dtype=torch.float64)) / len(tokens)


class Meter:
    """Losses of candidates on window sets, whose full-precision final hidden states are at hand.

    logits: by the candidates' head. reference: {windows: hidden states of the scored tokens, [tokens, hidden_size]}.
    tokens: whose logits exist at once, of `chunk_tokens`. cache_memory: bytes that the measure's view of the reference
    may take, over all window sets.
    """

    def __init__(
        self, logits: Logits, reference: Mapping[str, Tensor], measure: Measure, tokens: int, cache_memory: int
    ) -> None:
        self._logits, self._reference, self._measure, self._tokens = logits, reference, measure, tokens
        self._cache: dict[str, list[Tensor]] = {name: [] for name in reference}
        """`Measure.of_reference` of the first chunks of each window set, as many as fit."""
        for name, hidden in reference.items():
            for index in range(-(-len(hidden) // tokens)):
                compared = self._of_reference(name, index)
                if compared.nbytes > cache_memory:
                    break
                cache_memory -= compared.nbytes
                self._cache[name].append(compared)

    def by(self, loss: str) -> Meter:
        """One that measures another divergence of `amq.model.losses`, and shares what this one keeps of the reference:
        its log-probabilities, where this one measures a divergence too."""
        assert isinstance(self._measure, Divergence), "what is kept is another measure's"
        other = copy(self)
        other._measure = self._measure.by(loss)
        return other

    @property
    def cached_bytes(self) -> int:
        """Of reference log-probabilities."""
        return sum(chunk.nbytes for chunks in self._cache.values() for chunk in chunks)

    def nbytes(self, windows: str) -> int:
        """Of one candidate's hidden states."""
        return self._reference[windows].nbytes

    def losses(self, windows: str, candidates: Sequence[Tensor], head: str = KEPT.name) -> list[float]:
        """candidates: final hidden states of one configuration each, [scored tokens, hidden_size]; head: its format.

        NaN or infinity where that is the loss of some token; the tokens behind it are not looked at.
        """
        found: list[list[Tensor]] = [[] for _ in candidates]
        failed: dict[int, float] = {}
        cached = self._cache[windows]
        for index in range(-(-len(self._reference[windows]) // self._tokens)):
            wanted = [i for i in range(len(candidates)) if i not in failed]
            if not wanted:
                break
            reference = cached[index] if index < len(cached) else self._of_reference(windows, index)
            rows = self._rows(index)
            for i in wanted:
                losses = self._measure.of_tokens(windows, rows, reference, self._logits(candidates[i][rows], head))
                found[i].append(losses)
                if not math.isfinite(total := float(losses.sum(dtype=torch.float64))):
                    failed[i] = total
        return [
            failed[i] if i in failed else self._measure.of_windows(windows, torch.cat(parts))
            for i, parts in enumerate(found)
        ]

    def _rows(self, index: int) -> slice:
        return slice(index * self._tokens, (index + 1) * self._tokens)

    def _of_reference(self, windows: str, index: int) -> Tensor:
        rows = self._rows(index)
        return self._measure.of_reference(windows, rows, self._logits(self._reference[windows][rows], KEPT.name))


def chunk_tokens(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """(tokens whose logits exist at once, tokens whose loss torch computes at once) of a vocabulary.

    On a CPU what its caches hold. Elsewhere powers of two that take a `SHARE` of the memory that is free there: few
    launches where there is much of it, and no failure where there is little.
    """
    if device.type == "cpu":
        return TOKENS, ROWS
    room = free_on(str(device)) // SHARE
    logits, losses = (_power_of_two(room // (size * vocabulary)) for size in (LOGITS_BYTES, LOSS_BYTES))
    return min(logits, MOST_TOKENS), min(losses, MOST_TOKENS)


def _power_of_two(most: int) -> int:
    """The largest up to `most`, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def token_losses(loss: str, device: torch.device, rows: int = ROWS) -> Callable[[Tensor, Tensor], Tensor]:
    """(reference log-probabilities, candidate logits), float32 [tokens, vocabulary] each → losses [tokens].

    rows: tokens whose loss torch computes at once. `amq.model.losses` is the specification; on CPU the default loss has
    a fused kernel, which takes a fifth of torch's time.
    """
    if loss == "jsd" and device.type == "cpu":
        return jensen_shannon

    def by_torch(reference: Tensor, logits: Tensor) -> Tensor:
        pairs = zip(reference.split(rows), logits.split(rows), strict=True)
        return torch.cat([LOSSES[loss](p, x.log_softmax(-1)) for p, x in pairs])

    return by_torch
