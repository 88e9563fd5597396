"""Stacks: a weight as a sum of rounds, each of signs and a low rank, of which as many are held as there is room.

BitStack's (arXiv 2410.23918): with a[k] the root mean square of input k, R = W diag(a), each round is
sign(R) ⊙ L Mᵀ, L Mᵀ the nearest matrix to |R| of rank `RANK`, and the next round's R is what is left. diag(1/a) is
folded into M. A round takes a bit for each weight and the two factors in fp16, so a model grows by linears' rounds in
turn: all first rounds, then all second ones, in each the linears before others whose lack of rounds loses most. No
kernel of amq multiplies signs: weights are put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amq.model.inventory import LinearSpec, get_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK, ROUNDS = 4, 6
OVERSAMPLED, TURNS = 4, 3
"""Of the iteration for the leading `RANK` directions: more that come along, and how often it is done."""
HALF = 2
"""Bytes of a factor's number."""
LEAST = 1e-4
"""Of the mean input: what never fires has no scale."""


@dataclass(frozen=True)
class Round:
    """signs: uint8 [out_features, ⌈in_features/8⌉], 1 for a positive weight, first feature in the highest bit. left:
    float16 [out_features, RANK]; right: float16 [in_features, RANK]."""

    signs: Tensor
    left: Tensor
    right: Tensor

    def weight(self) -> Tensor:
        """float32 [out_features, in_features]."""
        count = len(self.right)
        positive = torch.from_numpy(np.unpackbits(self.signs.numpy(), axis=1, count=count))
        return (self.left.float() @ self.right.float().t()).mul_(positive.mul(2.0).sub_(1.0))


Stack = tuple[Round, ...]


def round_bytes(spec: LinearSpec) -> int:
    """What a round of a linear takes."""
    signs = spec.out_features * -(-spec.in_features // 8)
    return signs + HALF * RANK * (spec.out_features + spec.in_features)


@torch.no_grad()
def decompose(weight: Tensor, squares: Tensor, seed: int, rounds: int = ROUNDS) -> Stack:
    """`rounds` rounds, on the CPU. weight: [out_features, in_features]; squares: mean squares of inputs, [in_features];
    seed: of the directions that the iteration begins with."""
    generator, found = torch.Generator().manual_seed(seed), list[Round]()
    scale = squares.float().sqrt()
    scale = scale.clamp_min(LEAST * scale.mean()) if bool(scale.any()) else torch.ones_like(scale)
    left = weight.float().cpu()
    for _ in range(rounds):
        scaled = left * scale
        signs = torch.from_numpy(np.packbits((scaled >= 0).numpy(), axis=1))
        u, v = _leading(scaled.abs_(), generator)
        found.append(Round(signs, u.half(), (v / scale.unsqueeze(1)).half()))
        left = left - found[-1].weight()
    return tuple(found)


def _leading(matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[rows, RANK] and [columns, RANK] whose product is next to the nearest one to `matrix`, by subspace iteration."""
    count = min(RANK + OVERSAMPLED, *matrix.shape)
    basis = torch.randn(matrix.shape[1], count, generator=generator)
    for _ in range(TURNS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    u, s, v = torch.linalg.svd(matrix @ basis, full_matrices=False)
    root = s[:RANK].sqrt()
    return u[:, :RANK] * root, basis @ v.t()[:, :RANK] * root


def fill(linears: Sequence[LinearSpec], capacity: float) -> dict[str, int]:
    """{linear: its rounds} within `capacity` bytes; linears: the most important first. The first round that has no room
    is the last that is looked at, as in a stack; with room for less than a round of each, some have none."""
    counts, used = dict.fromkeys((spec.name for spec in linears), 0), 0
    for _ in range(ROUNDS):
        for spec in linears:
            used += round_bytes(spec)
            if used > capacity:
                return counts
            counts[spec.name] += 1
    return counts


def in_stacks(
    model: PreTrainedModel, stacks: Mapping[str, Stack], counts: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """(linear, the sum of so many rounds), one at a time, of those in `counts`; a linear without any is nothing."""
    for name, count in counts.items():
        weight = get_weight(model, name)
        yield name, _sum(stacks[name][:count], weight.shape).to(weight.device, weight.dtype)


def _sum(rounds: Iterable[Round], shape: torch.Size) -> Tensor:
    total = torch.zeros(shape)
    for one in rounds:
        total += one.weight()
    return total
