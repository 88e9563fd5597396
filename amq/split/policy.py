"""Who gets how many bits: the policies of one stream, that is of one direction at one cut.

A policy belongs to the sender; the receiver is told what it decided. It is asked once a step for a table of widths,
sees what was sent, and, for hidden states, the gradient that came back for them: learning costs no traffic.

    none       float32, or float16
    fixed      the same width for every channel; a fractional mean is spread evenly over the channels
    aq-sgd     fixed, of the difference to what the same sample gave in its last visit (arXiv 2206.01299); the first
               visit goes uncompressed in float16, gradients go directly
    amaq       arXiv 2510.05468: bits_c = min + (max − min) · σ(α Q_c), Q trained by the loss through straight-through
               rounding and by β · mean σ(α Q)²
    waterfill  ours: the widths of the least Σ √F_c · error_c(width) at an exact mean (amq.search.knapsack), with
               F_c = E[g²] of the gradients that came back; of gradients themselves by their error alone
    step       ours: one step for all channels, entropy-coded, steered to a number of bytes

What amaq learns, with x̂ = low + k·s, s = range / (2^b − 1) and u = (x − low)/s:
∂x̂/∂b = (k − u) · ∂s/∂b = −ln 2 · 2^b/(2^b − 1) · (x̂ − x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amq.search.knapsack import select
from amq.split import quantizer
from amq.split.quantizer import MOST_WIDTH, WIDTHS, Codes
from amq.split.settings import LEAST_BITS
from amq.split.terms import PolicyTerms

SCHEDULE = 0.6
"""Share of the steps over which mean bits fall from start to target."""
REFRESH = 20
"""Steps between tables of waterfill; the first comes after one step, when there is something to go by."""
MEMORY = 0.95
"""What a micro-batch leaves of the running mean of squared gradients."""
AMAQ_LEAST, AMAQ_RATE, AMAQ_TRAVEL = int(LEAST_BITS["amaq"]), 0.05, 4.4
"""min of amaq's bits; learning rate of Q under Adam, which moves Q by about that much a step; and α·Q's way from
σ = 0.9 to 0.1, which α is chosen for over all steps."""
AMAQ_FADES = 0.5
"""Bits from the target at which its regulariser begins to fade."""
HORIZON = 10
"""Steps over which `step` makes up for bytes that it is over or under."""

State = dict[str, Tensor]


def named(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    """The entries under `prefix.…`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """Entries `prefix.…` under the rest of their names."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def scheduled(step: int, steps: int, start: float, target: float) -> float:
    """Mean bits at a step: a cosine from start to target over the first `SCHEDULE` of the steps."""
    done = min(1.0, step / max(1.0, SCHEDULE * steps))
    return target + (start - target) * 0.5 * (1 + math.cos(math.pi * done))


def spread(bits: float, channels: int) -> Tensor:
    """Widths of mean `bits`, int64 [channels]: where it is no whole number, the wider ones evenly among the others."""
    edges = (torch.arange(channels + 1, dtype=torch.float64) * bits + 1e-9).floor().to(torch.int64)
    return (edges[1:] - edges[:-1]).clamp(1, MOST_WIDTH)


@dataclass
class Policy:
    """Of what has no table; the base of the others. channels: of the stream; forward: hidden states, not gradients.

    widths: int64 [channels], in force for the current step, or None.
    group: tokens that share a range.
    """

    terms: PolicyTerms
    channels: int
    group: int
    forward: bool = True
    widths: Tensor | None = None

    def __post_init__(self) -> None:
        """Sets what a policy keeps between steps as it is before the first."""

    def begin(self, step: int) -> None:
        """Before a step's first micro-batch; may set `widths`."""

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        """The payload of x, float32 [channels, tokens]. samples: which windows of the text it is of, equally long."""
        return quantizer.pack_raw(x, self.terms.half)

    def returned(self, gradient: Tensor) -> None:
        """The gradient for the oldest x of this step that has had none; float32 [channels, tokens]."""

    def end(self, step: int) -> None:
        """After a step's last micro-batch: learns."""

    def state(self) -> State:
        """What has to be kept for the next step to be what it would have been."""
        return {} if self.widths is None else {"widths": self.widths}

    def load(self, state: State) -> None:
        self.widths = state.get("widths")

    @property
    def goal(self) -> tuple[float, float]:
        """(start, target) of the stream's mean bits."""
        if self.forward or self.terms.backward_bits is None:
            return self.terms.start_bits, self.terms.target_bits
        return max(self.terms.start_bits, self.terms.backward_bits), self.terms.backward_bits

    def _ranged(self, x: Tensor) -> Codes:
        assert self.widths is not None
        return quantizer.ranged(x, quantizer.levels_of(self.widths), min(self.group, x.shape[1]))


class Fixed(Policy):
    def begin(self, step: int) -> None:
        self.widths = spread(self.goal[1], self.channels)

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        return quantizer.pack(self._ranged(x), self.terms.coded)


class Waterfill(Fixed):
    def __post_init__(self) -> None:
        self._fisher: Tensor | None = None
        self._last: Tensor | None = None

    def begin(self, step: int) -> None:
        if self.widths is None:
            self.widths = spread(self.goal[0], self.channels)

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        self._last = x
        return super().encode(x, samples)

    def returned(self, gradient: Tensor) -> None:
        squared = gradient.square().mean(1)
        self._fisher = squared if self._fisher is None else MEMORY * self._fisher + (1 - MEMORY) * squared

    def end(self, step: int) -> None:
        assert self._last is not None
        if step and (step + 1) % REFRESH:
            return
        last, group = self._last, min(self.group, self._last.shape[1])
        costs = torch.stack([quantizer.error_of(last, width, group) for width in WIDTHS], 1).double()
        if self._fisher is not None:
            costs *= self._fisher.double().sqrt().unsqueeze(1)
        self.widths = fill(costs, scheduled(step + 1, self.terms.steps, *self.goal))

    def state(self) -> State:
        return super().state() | ({} if self._fisher is None else {"fisher": self._fisher})

    def load(self, state: State) -> None:
        super().load(state)
        self._fisher = state.get("fisher")


def fill(costs: Tensor, bits: float) -> Tensor:
    """Widths of the least total cost whose mean is at most `bits`, int64 [channels]; costs: [channels, len(WIDTHS)]."""
    sizes = np.broadcast_to(np.array(WIDTHS, dtype=np.int64), costs.shape)
    largest = float(costs.max()) or 1.0
    chosen = select(costs.numpy() / largest, sizes, math.floor(bits * len(costs) + 1e-6), pairs=False)
    return torch.from_numpy(chosen).to(torch.int64) + WIDTHS[0]


class Amaq(Fixed):
    """The gate Q and its descent. Near the target the regulariser fades with the distance of the mean from it, and
    turns its sign below; the paper's does not, and its mean is what β makes of it."""

    def __post_init__(self) -> None:
        self._alpha = AMAQ_TRAVEL / (AMAQ_RATE * self.terms.steps)
        share = (self.goal[0] - AMAQ_LEAST) / (MOST_WIDTH - AMAQ_LEAST)
        share = min(max(share, 0.01), 0.99)
        self._q = torch.full((self.channels,), math.log(share / (1 - share)) / self._alpha, requires_grad=True)
        self._adam = torch.optim.Adam([self._q], lr=AMAQ_RATE)
        self._slope = torch.zeros(self.channels)
        self._seen: list[Tensor] = []  # x̂ − x of tensors whose gradient has not come yet

    def _sigma(self) -> Tensor:
        return torch.sigmoid(self._alpha * self._q.detach())

    def mean(self) -> float:
        """Of the bits, unrounded."""
        return AMAQ_LEAST + (MOST_WIDTH - AMAQ_LEAST) * float(self._sigma().mean())

    def begin(self, step: int) -> None:
        bits = AMAQ_LEAST + (MOST_WIDTH - AMAQ_LEAST) * self._sigma()
        self.widths = bits.round().to(torch.int64)

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        codes = self._ranged(x)
        self._seen.append(codes.dequantize().sub_(x))
        return quantizer.pack(codes, self.terms.coded)

    def returned(self, gradient: Tensor) -> None:
        assert self.widths is not None
        levels = (1 << self.widths).float()
        self._slope -= math.log(2) * levels / (levels - 1) * (gradient * self._seen.pop(0)).sum(1)

    def end(self, step: int) -> None:
        sigma = self._sigma()
        slope = self._slope * (MOST_WIDTH - AMAQ_LEAST) * self._alpha * sigma * (1 - sigma)
        near = min(1.0, max(-1.0, (self.mean() - self.goal[1]) / AMAQ_FADES))
        slope += near * self.terms.beta * 2 * self._alpha / self.channels * sigma.square() * (1 - sigma)
        self._q.grad = slope
        self._adam.step()
        self._slope = torch.zeros(self.channels)

    def state(self) -> State:
        kept = self._adam.state_dict()["state"].get(0, {})
        return super().state() | {"q": self._q.detach()} | named("adam", kept)

    def load(self, state: State) -> None:
        super().load(state)
        with torch.no_grad():
            self._q.copy_(state["q"])
        kept = {name: value.clone() for name, value in below(state, "adam").items()}
        whole = self._adam.state_dict()
        self._adam.load_state_dict({**whole, "state": {0: kept} if kept else {}})


class Shared(Policy):
    """amaq's gradients: with the widths of the hidden states that they answer, which the stream sets."""

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        return quantizer.pack(self._ranged(x), self.terms.coded)

    def state(self) -> State:
        return {}


class Step(Policy):
    """One step for all channels; its logarithm falls and rises with the bits that were spent too many or too few."""

    def __post_init__(self) -> None:
        self._log: float | None = None
        self._over = 0.0
        self._exponent = 0  # of the last tensor
        self._spent: list[float] = []

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        if self._log is None:
            self._log = self._first(x)
        codes = quantizer.common(x, 2.0**self._log)
        self._exponent = codes.exponent
        payload = quantizer.pack(codes, self.terms.coded)
        self._spent.append(8 * len(payload) / x.numel())
        return payload

    def _first(self, x: Tensor) -> float:
        """log2 of the step with which the first tensor takes the bits of the start, by bisection."""
        low, high = -40.0, math.log2(float(x.abs().max()) + 1e-30) + 1
        for _ in range(16):
            middle = (low + high) / 2
            bits = 8 * len(quantizer.pack(quantizer.common(x, 2.0**middle), self.terms.coded)) / x.numel()
            low, high = (middle, high) if bits > self.goal[0] else (low, middle)
        return high

    def end(self, step: int) -> None:
        assert self._log is not None
        spent = sum(self._spent) / len(self._spent)
        self._over += spent - scheduled(step, self.terms.steps, *self.goal)
        wanted = scheduled(step + 1, self.terms.steps, *self.goal) - self._over / HORIZON
        moved = self._log + min(1.0, max(-1.0, spent - wanted))
        # where the bits cannot be had, the step stays in sight of those that change something
        self._log = min(max(moved, self._exponent + quantizer.LEAST_STEP), self._exponent + quantizer.MOST_STEP)
        self._spent = []

    def state(self) -> State:
        if self._log is None:
            return {}
        return {"step": torch.tensor([self._log, self._over], dtype=torch.float64)}

    def load(self, state: State) -> None:
        self._log, self._over = state["step"].tolist() if "step" in state else (None, 0.0)


class AqSgd(Fixed):
    """Differences to a sample's last visit. The cache is fp16 [channels, length] per sample, equal at both ends."""

    def __post_init__(self) -> None:
        self.cache: dict[int, Tensor] = {}

    def encode(self, x: Tensor, samples: Sequence[int]) -> bytes:
        before = recall(self.cache, samples)
        if before is None:
            payload, after = quantizer.pack_raw(x, True), x.half().float()
        else:
            assert self.widths is not None
            levels = quantizer.levels_of(self.widths)
            codes = quantizer.ranged(x - before, levels, min(self.group, x.shape[1]), symmetric=True)
            payload, after = quantizer.pack(codes, self.terms.coded), before + codes.dequantize()
            quantizer.check_finite(after.half(), "what is to be kept in float16, which ends at 65504,")
        remember(self.cache, samples, after)
        return payload

    def state(self) -> State:
        return super().state() | cache_state(self.cache)

    def load(self, state: State) -> None:
        super().load(state)
        self.cache = load_cache(state)


def recall(cache: dict[int, Tensor], samples: Sequence[int]) -> Tensor | None:
    """What samples gave last, float32 [channels, tokens]; None unless all have been seen."""
    found = [cache[sample] for sample in samples if sample in cache]
    return torch.cat(found, 1).float() if len(found) == len(samples) else None


def remember(cache: dict[int, Tensor], samples: Sequence[int], x: Tensor) -> None:
    for sample, part in zip(samples, x.half().chunk(len(samples), 1), strict=True):
        cache[sample] = part.contiguous()


def cache_state(cache: dict[int, Tensor]) -> State:
    return named("cache", {str(sample): tensor for sample, tensor in cache.items()})


def load_cache(state: State) -> dict[int, Tensor]:
    return {int(sample): tensor for sample, tensor in below(state, "cache").items()}


FORWARD: dict[str, type[Policy]] = {
    "none": Policy, "fixed": Fixed, "aq-sgd": AqSgd, "amaq": Amaq, "waterfill": Waterfill, "step": Step,
}  # fmt: skip
BACKWARD: dict[str, type[Policy]] = {**FORWARD, "aq-sgd": Fixed, "amaq": Shared}
"""Of gradients: no sample's gradient is near its last, and none has a gradient of its own to learn from."""
