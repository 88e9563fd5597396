"""How the next token is chosen: greedily, or drawn with temperature, top-k, top-p, min-p and penalties.

The order is transformers': bias, penalties, the tokens that may come next, temperature, top-k, top-p, min-p; the tokens
that survive and their probabilities are the same. Every filter keeps the likeliest tokens up to some rank, so only
those that may survive are sorted, not the vocabulary: first the few likeliest, and more only where these lack the mass
that top-p asks for. Where a constraint leaves a part of the vocabulary, the rest of the work is on that part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from amq.errors import AmqError
from amq.runtime.settings import Sampling

if TYPE_CHECKING:
    from torch import Tensor

FIRST_CANDIDATES = 256
"""Tokens that are looked at before top-p looks at all; of a language model they mostly suffice."""
COLUMNS_PER_TOKEN = 4
BLOCK = 256
"""Weights that are summed up first when one is drawn from all: a running sum of the vocabulary takes long."""


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    logprob: its log probability, if wanted. top: the likeliest tokens and theirs, likeliest first.
    Both are of the model's own distribution: temperature 1, before penalties and filters.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What a text has to keep to, such as a grammar (amq.runtime.grammar). Both raise AmqError where that failed."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: bits of int32 [⌈vocabulary / 32⌉], the lowest first."""

    def accept(self, token: int) -> None:
        """`token` came next."""


def follows_from_logits(how: Sampling) -> bool:
    """Whether the next token needs only the latest logits and a random number, and nothing is told of them: an engine
    may choose it where the logits are."""
    changed = how.logit_bias or (how.repetition_penalty, how.presence_penalty, how.frequency_penalty) != (1, 0, 0)
    return not changed and how.logprobs is None and how.min_tokens == 0


def no_token(largest: str) -> AmqError:
    """Why there is no next token: `largest` came as the largest logit."""
    return AmqError(
        f"the model gave {largest} as a logit, so there is no next token: its weights or its activations "
        "overflow; try --dtype float32, or quantize it again"
    )


class Sampler:
    """Chooses the tokens of one text: keeps its own random generator and the tokens that penalties look at.

    ends: tokens that end the text, which none of the first `min_tokens` is unless `constraint` leaves no other.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        ends: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling, self._constraint = sampling, constraint
        drawn = sampling.temperature > 0
        seed = None if sampling.seed is None else sampling.seed % 2**64  # numpy takes no negative ones
        self._random = np.random.default_rng(seed) if drawn else None
        self._repeats = sampling.repetition_penalty != 1
        self._counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._seen = np.unique(np.asarray(prompt, dtype=np.int64)) if self._repeats else np.empty(0, np.int64)
        self._new: dict[int, int] = {}
        self._chosen = 0
        self._ends = np.fromiter(ends, np.int64)
        self._bias = tuple(np.array(side) for side in zip(*sampling.logit_bias, strict=True))  # tokens, what is added

    def choose(self, logits: Tensor) -> Choice:
        """The next token.

        logits: float32 [vocabulary] on the CPU, not changed.
        Raises AmqError where they hold NaN or an infinity above all else, and where no token may come next.
        """
        raw = logits.numpy()
        likeliest, largest = _largest(raw)
        scores = self._changed(raw)
        candidates = self._candidates(len(raw))
        if candidates is not None:
            scores = scores[candidates]
            if not len(scores) or scores.max() == -np.inf:
                raise AmqError("the model rules out every token that may come next")
        if scores is raw and self._random is None:
            place = likeliest  # a search of the vocabulary less
        else:
            place = int(scores.argmax()) if self._random is None else self._draw(scores)
        token = place if candidates is None else int(candidates[place])
        self._remember(token)
        if self.sampling.logprobs is None:
            return Choice(token)
        return _with_logprobs(token, raw, largest, self.sampling.logprobs)

    def _candidates(self, vocabulary: int) -> np.ndarray | None:
        """Tokens that may come next, int64 [n], ascending; None: all."""
        early = self._chosen < self.sampling.min_tokens and len(self._ends) > 0
        if self._constraint is None and not early:
            return None
        allowed = np.ones(vocabulary, bool)
        if self._constraint is not None:
            bits = self._constraint.allowed().view(np.uint8)
            allowed = np.unpackbits(bits, count=vocabulary, bitorder="little").view(bool)
        if early:
            later = allowed.copy()
            later[self._ends[self._ends < vocabulary]] = False
            allowed = later if later.any() else allowed
        return np.flatnonzero(allowed)

    def _remember(self, token: int) -> None:
        self._chosen += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._repeats and token not in self._new:
            self._seen = np.union1d(self._seen, token)
        if self._repeats or self._counts:
            self._new[token] = self._new.get(token, 0) + 1

    def _changed(self, raw: np.ndarray) -> np.ndarray:
        """Bias and penalties applied; `raw` itself where there are none."""
        if not (self._bias or self._repeats or self._counts):
            return raw
        how, scores = self.sampling, raw.copy()
        if self._bias:
            tokens, added = self._bias
            scores[tokens] += added
        if self._repeats:
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty)
        if self._counts and self._new:
            tokens = np.fromiter(self._new, np.int64, len(self._new))
            counts = np.fromiter(self._new.values(), np.float32, len(self._new))
            scores[tokens] -= how.frequency_penalty * counts + how.presence_penalty
        return scores

    def _draw(self, scores: np.ndarray) -> int:
        tokens, weights = survivors(scores, self.sampling)
        assert self._random is not None
        place = _place(weights, self._random.random())
        return place if tokens is None else int(tokens[place])


def _place(weights: np.ndarray, share: float) -> int:
    """Where the running sum of `weights` passes `share`, in [0, 1), of their total; never at a weight of 0."""
    starts = np.arange(0, len(weights), BLOCK)
    first, inside = _passed(np.add.reduceat(weights, starts), share)
    block = weights[starts[first] : starts[first] + BLOCK]
    return int(starts[first]) + _passed(block, inside)[0]


def _passed(weights: np.ndarray, share: float) -> tuple[int, float]:
    """The place, and which share of the weight there was passed."""
    sums = np.cumsum(weights, dtype=np.float64)
    target = share * sums[-1]
    place = int(min(np.searchsorted(sums, target, side="right"), np.searchsorted(sums, sums[-1])))  # may round up to it
    return place, max(0.0, float((target - (sums[place] - weights[place])) / weights[place]))


def survivors(scores: np.ndarray, how: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Tokens that may be drawn, and their weights, which are probabilities but for a factor.

    scores: float32 [vocabulary], penalties applied; the largest is finite.
    Returns int64 [n] (None: all tokens, by id) and float [n].
    """
    largest = scores[scores.argmax()]
    if how.top_k:
        tokens = _likeliest(scores, how.top_k)
        last = scores[tokens[min(how.top_k, len(tokens)) - 1]]
        tokens = tokens[scores[tokens] >= last]  # equals of the last one survive too, as in transformers
        weights = _weights(scores[tokens], largest, how.temperature)
        keep = _rank(weights, weights.sum(), how)
        return tokens[:keep], weights[:keep]
    weights = _weights(scores, largest, how.temperature)
    if how.top_p == 1:
        if how.min_p == 0:
            return None, weights
        tokens = np.flatnonzero(weights >= how.min_p)
        return tokens, weights[tokens]
    total = weights.sum(dtype=np.float64)
    tokens = _likeliest(scores, FIRST_CANDIDATES)
    some = weights[tokens]
    if some.sum(dtype=np.float64) < how.top_p * total and some[-1] >= how.min_p:
        return _many(weights, total, how)
    keep = _rank(some, total, how)
    return tokens[:keep], some[:keep]


def _many(weights: np.ndarray, total: float, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """`survivors` where they may be thousands: sorts values, which is much faster than sorting ids by them."""
    # tokens of at most (1 - p) / vocabulary cannot make up more than the 1 - p that is left out: none of them survives
    tokens = np.flatnonzero(weights > (1 - how.top_p) * total / len(weights))
    some = weights[tokens]
    values = -np.sort(-some)
    keep = _rank(values, total, how)
    kept = some >= values[keep - 1]
    equals = np.flatnonzero(some == values[keep - 1])
    kept[equals[len(equals) - (int(kept.sum()) - keep) :]] = False  # of equals, the lowest ids
    return tokens[kept], some[kept]


def _weights(scores: np.ndarray, largest: np.floating, temperature: float) -> np.ndarray:
    """exp(score / temperature), the largest 1."""
    weights = scores - largest
    with np.errstate(over="ignore"):  # −∞ of a tiny temperature is a weight of 0, as it should be
        weights *= np.float32(1 / max(temperature, 1e-30))
    return np.exp(weights, out=weights)


def _rank(weights: np.ndarray, total: float, how: Sampling) -> int:
    """How many of `weights`, largest first, top-p and min-p leave; at least 1."""
    keep = len(weights)
    if how.top_p < 1:
        before = np.cumsum(weights, dtype=np.float64) - weights
        keep = int(np.searchsorted(before, how.top_p * total))
    if how.min_p > 0:
        keep = min(keep, int(np.searchsorted(-weights, -how.min_p, side="right")))
    return max(keep, 1)


def _likeliest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest scores, and of some more, largest first, of equals the lowest id; no `count` beyond.

    The scores are laid out in rows, and the largest of each column taken: `count` columns reach the count-th largest of
    these, so at least `count` scores do, and only those that do are sorted.
    """
    rows = min(64, len(scores) // (COLUMNS_PER_TOKEN * count))
    if rows < 2:
        return np.argsort(-scores, kind="stable")
    columns = len(scores) // rows
    tops = scores[: rows * columns].reshape(rows, columns).max(axis=0)
    tokens = np.flatnonzero(scores >= np.partition(tops, columns - count)[columns - count])
    return tokens[np.argsort(-scores[tokens], kind="stable")]


def score(token: int, logits: Tensor, count: int) -> Choice:
    """A token that came, as if it had been chosen.

    logits: float32 [vocabulary] on the CPU, before it. count: as `Sampling.logprobs`.
    Raises AmqError as `Sampler.choose`.
    """
    raw = logits.numpy()
    return _with_logprobs(token, raw, _largest(raw)[1], count)


def _largest(raw: np.ndarray) -> tuple[int, float]:
    """The likeliest token, the lowest of equals, and its logit."""
    token = int(raw.argmax())  # numpy's argmax stops at a NaN
    largest = float(raw[token])
    if not math.isfinite(largest):
        raise no_token(str(largest))
    return token, largest


def _with_logprobs(token: int, raw: np.ndarray, largest: float, count: int) -> Choice:
    log_sum = largest + math.log(np.exp(raw - np.float32(largest)).sum(dtype=np.float64))
    top = _likeliest(raw, count)[:count] if count else ()
    return Choice(token, float(raw[token]) - log_sum, tuple((int(t), float(raw[t]) - log_sum) for t in top))
