"""Work on many or on large weights in pieces, so that what it takes beside the weights is bounded.

A layer of experts is hundreds of linears that share an input, and an embedding is larger than a block: neither is
copied as a whole into float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amq.kernels.dense import dequantize_into, dequantized
from amq.model.inventory import LinearSpec
from amq.packing import PackedWeight

STACK = 1 << 26
"""Most weights that are given to a quantizer at once, unless one linear has more."""
PIECE = 1 << 24
"""Weights that are dequantized at once."""
ALIGNMENT = 16


class Room:
    """One allocation of `nbytes` that tensors are copied into.

    What stays of hundreds of linears, allocated between what each of them takes for a moment, leaves the heap full of
    holes, and a tensor that is only a view is such an allocation too: so views are made at the end.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory, self._used = torch.empty(nbytes, dtype=torch.uint8), 0
        self._places: dict[str, tuple[int, int, torch.dtype, torch.Size]] = {}

    @staticmethod
    def needed(nbytes: int, tensors: int) -> int:
        """For so many tensors of `nbytes` together."""
        return nbytes + ALIGNMENT * tensors

    def keep(self, name: str, tensor: Tensor) -> None:
        """Copies `tensor` in here."""
        place = (self._used, tensor.nbytes, tensor.dtype, tensor.shape)
        self._places[name] = place
        self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._view(*place).copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """{name: what was kept under it}, as views."""
        return {name: self._view(*place) for name, place in self._places.items()}

    def _view(self, start: int, nbytes: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return self._memory[start : start + nbytes].view(dtype).view(shape)


def stacks(specs: Sequence[LinearSpec], most: int = STACK) -> Iterator[list[LinearSpec]]:
    """`specs` in their order, in lists of at most `most` weights, or of one linear."""
    stack: list[LinearSpec] = []
    size = 0
    for spec in specs:
        if stack and size + spec.numel > most:
            yield stack
            stack, size = [], 0
        stack.append(spec)
        size += spec.numel
    if stack:
        yield stack


def pieces(weight: Tensor, packed: PackedWeight | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(rows of `weight` as float32, the same rows of `packed` dequantized), which both may be changed."""
    step = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        rounded = None if packed is None else dequantized(packed.rows(start, start + len(rows)).to(weight.device))
        yield rows.to(torch.float32, copy=True), rounded


def square_error(weight: Tensor, packed: PackedWeight | None) -> float:
    """‖W − Ŵ‖², summed in float64; ‖W‖² without `packed`. weight: [out_features, in_features]."""
    return sum(
        float((rows if rounded is None else rounded.sub_(rows)).square_().sum(dtype=torch.float64))
        for rows, rounded in pieces(weight, packed)
    )


def put(target: Tensor, packed: PackedWeight) -> None:
    """Writes the dequantized weight into `target` [out_features, in_features], of any dtype and device."""
    step = max(1, PIECE // max(1, target.shape[1]))
    for start in range(0, len(target), step):
        rows = target[start : start + step]
        part = packed.rows(start, start + len(rows))
        if rows.device.type == "cpu" or not rows.is_contiguous():
            rows.copy_(dequantized(part))
        else:
            dequantize_into(part, rows)
