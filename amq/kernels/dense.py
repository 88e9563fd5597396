"""Packed weights as dense matrices, on whatever device the matrix is.

On a CPU `amq._cpu` writes it. On an NVIDIA or AMD GPU a Triton kernel reads the packed rows as they are stored and
writes each number once: (b + 32/group_size)/8 bytes read and 2 or 4 written per code of b bits, where plain torch,
which makes int64 of every byte, moves some ninety. Plain torch is what other devices have, and a GPU without Triton, in
pieces of bounded size; all give the bits of `amq.packing.dequantize`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cpu, triton
from amq.packing import PackedWeight, dequantize
from amq.rotation import rotate

PIECE = 1 << 22
"""Weights that plain torch makes on a GPU at once, at ninety bytes each, or rotates back."""

log = logging.getLogger(__name__)


def dequantize_into(packed: PackedWeight, out: Tensor) -> None:
    """Overwrites `out` [out_features, in_features], contiguous, of any float dtype, with the dequantized weight.

    packed: on any device; what is not on that of `out` is copied there. Raises AmqError where the shapes differ or
    `out` is not contiguous.
    """
    packed = packed.to(out.device)
    if out.device.type == "cpu":
        cpu.dequantize_into(packed, out)
        return
    shape = [packed.out_features, packed.in_features]
    if list(out.shape) != shape or not out.is_contiguous():
        raise AmqError(
            f"dequantize {packed.format.name}: out must be {shape} and contiguous, got {list(out.shape)} with strides "
            f"{list(out.stride())}"
        )
    if out.device.type == "cuda":
        reason = triton.unsupported_reason(packed.format)
        if reason is None:
            _by_triton(packed, out)
            return
        _warn(reason)
    for start, stop in _pieces(packed):
        out[start:stop].copy_(dequantize(packed.rows(start, stop)))


def _by_triton(packed: PackedWeight, out: Tensor) -> None:
    """`dequantize_into` for what is on the device of `out`."""
    if not packed.rotation:
        triton.dequantize_rows(packed, out)
        return
    for start, stop in _pieces(packed):  # in float32 until it is rotated back
        stored = torch.empty_like(out[start:stop], dtype=torch.float32)
        triton.dequantize_rows(packed.rows(start, stop), stored)
        out[start:stop].copy_(rotate(stored))


def _pieces(packed: PackedWeight) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last, of about `PIECE` weights each."""
    step = max(1, PIECE // max(1, packed.in_features))
    for start in range(0, packed.out_features, step):
        yield start, min(start + step, packed.out_features)


def dequantized(packed: PackedWeight) -> Tensor:
    """A new float32 tensor [out_features, in_features] on the device of `packed`."""
    out = torch.empty(packed.out_features, packed.in_features, device=packed.qweight.device)
    dequantize_into(packed, out)
    return out


@lru_cache
def _warn(reason: str) -> None:
    log.warning("weights are dequantized by plain torch, some twenty times slower than by Triton: %s", reason)
