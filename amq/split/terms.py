"""What two parties must agree on, as hello carries it: every difference is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amq.errors import AmqError
from amq.split.settings import CODERS, LABELS, POLICIES
from amq.util.records import check_range, parse_record, shorten, to_json

AQ_SGD_BACKWARD = 8.0
"""Bits of its gradients, as its authors' code has them."""


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """As the settings of the same names. coder: none or range."""

    policy: str
    coder: str
    start_bits: float
    target_bits: float
    backward_bits: float | None
    beta: float
    range_tokens: int
    half: bool
    steps: int

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or self.coder not in CODERS:
            raise ValueError(f"expected a policy of {', '.join(POLICIES)} and a coder of {', '.join(CODERS)}")
        check_range(self, "start_bits", "target_bits", "backward_bits", least=1e-3, most=8)
        check_range(self, "beta", least=0, most=1e9)
        check_range(self, "range_tokens", least=0)
        check_range(self, "steps")

    @property
    def coded(self) -> bool:
        return self.coder != "none"


@dataclass(frozen=True, kw_only=True)
class Terms(PolicyTerms):
    """model: fingerprint of the model's weights and config. text: hash of the training windows, for resuming.

    unscored: leading tokens of a window that are not predicted. samples: windows in an epoch.
    """

    version: str
    model: str
    dtype: str
    cut: int
    lora: int
    lora_alpha: float
    labels: str
    seed: int
    samples: int
    window_length: int
    unscored: int
    batch: int
    micro_batches: int
    learning_rate: float
    clip: float
    save_every: int
    text: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "cut", "lora", "samples", "batch", "micro_batches", "save_every", most=1 << 20)
        check_range(self, "window_length", least=2, most=1 << 24)
        check_range(self, "unscored", least=0, most=self.window_length - 2)
        check_range(self, "seed", least=0)
        check_range(self, "learning_rate", "clip", "lora_alpha", least=0, most=1e9)
        if self.labels not in LABELS or self.batch % self.micro_batches:
            raise ValueError(f"expected labels of {', '.join(LABELS)}, and micro_batches that divide batch")

    @property
    def windows(self) -> int:
        """Of a micro-batch."""
        return self.batch // self.micro_batches

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.windows * self.window_length

    @property
    def group(self) -> int:
        """Tokens that share a channel's range."""
        return min(self.range_tokens or self.tokens, self.tokens)

    @property
    def predicted(self) -> int:
        """Tokens that a step predicts."""
        return self.batch * (self.window_length - 1 - self.unscored)

    def json(self) -> dict[str, Any]:
        made = to_json(self)
        assert isinstance(made, dict)
        return made

    @classmethod
    def parse(cls, data: Any, source: str) -> Terms:
        """Raises AmqError naming `source` and the place in it."""
        return parse_record(data, cls, source)


def check_agreement(ours: Mapping[str, Any], theirs: Terms, whose: str) -> None:
    """Raises AmqError naming the first of `ours` that `theirs` has otherwise. whose: they are, as "this server's"."""
    for field in dataclasses.fields(theirs):
        if field.name in ours and ours[field.name] != getattr(theirs, field.name):
            came = getattr(theirs, field.name)
            raise AmqError(
                f"{field.name} differs: {whose} is {shorten(ours[field.name])}, the other party's {shorten(came)}: "
                "start both with the same"
            )
