"""Per-token losses between two next-token distributions, from logits; all in nats, all without clamping.

With p the reference and q the candidate distribution, d = ln q − ln p from two log-softmaxes and σ the logistic
function:

    JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = (p + q)/2
              = ½ Σ p·(ln 2 − softplus(d)) + q·(ln 2 − softplus(−d))          in [0, ln 2]

since m/p = (1 + e^d)/2. No probability is divided by, floored or renormalised, so a vanishing p or q contributes its
exact limit. `KL` is Σ p·(ln p − ln q), `cross_entropy` is −Σ p·ln q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amq.util.lazy import Registry

if TYPE_CHECKING:
    from torch import Tensor

LN2 = math.log(2.0)
"""The largest value of the Jensen–Shannon divergence."""
ANSWERS = "answers"
"""Objective: how far greedy answers differ from the full-precision model's."""


def jensen_shannon(reference: Tensor, candidate: Tensor) -> Tensor:
    """JSD per token, nats. reference, candidate: log-probabilities [tokens, vocabulary]; returns [tokens]."""
    import torch  # here: help texts list the losses

    difference = candidate - reference
    softplus = torch.nn.functional.softplus
    p, q = reference.exp(), candidate.exp()
    return 0.5 * (_weighted(p, LN2 - softplus(difference)) + _weighted(q, LN2 - softplus(-difference))).sum(-1)


def kullback_leibler(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference ‖ candidate) per token, nats; arguments as for `jensen_shannon`."""
    return _weighted(reference.exp(), reference - candidate).sum(-1)


def cross_entropy(reference: Tensor, candidate: Tensor) -> Tensor:
    """Cross-entropy of the candidate under the reference per token, nats; arguments as for `jensen_shannon`."""
    return -_weighted(reference.exp(), candidate).sum(-1)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, whose limit is 0 where the weight is 0 and the value infinite; NaN weights stay NaN."""
    import torch

    return torch.where(weight == 0, 0.0, weight * value)


LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry(
    "loss", {"jsd": jensen_shannon, "kl": kullback_leibler, "ce": cross_entropy}
)


@dataclass(frozen=True)
class Objective:
    """What a search minimises, for people and for curves. unit: of its losses. ceiling: about where they saturate."""

    title: str
    unit: str = "nats/token"
    ceiling: float = LN2

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"loss, {self.unit}"


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "jsd": Objective("Jensen–Shannon divergence from the full-precision model in nats per token"),
        "kl": Objective("Kullback–Leibler divergence from the full-precision model in nats per token"),
        "ce": Objective("cross-entropy under the full-precision model in nats per token"),
        ANSWERS: Objective(
            "share of tokens that differ from the full-precision model's greedy answer, each behind the answer so "
            "far and made smooth; the mean over prompts",
            "of an answer",
            1.0,
        ),
    },
)
"""What `--objective` offers: the divergences of `LOSSES`, and agreement of answers (`amq.proxy.answers`)."""
