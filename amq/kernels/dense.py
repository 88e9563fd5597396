"""Packed weights as dense matrices, on whatever device the matrix is.

On a CPU `amq._cpu` writes it. On an NVIDIA or AMD GPU a Triton kernel reads the packed rows as they are stored and
writes each number once: (b + 32/group_size)/8 bytes read and 2 or 4 written per code of b bits, where plain torch,
which makes int64 of every byte, moves some ninety. Plain torch is what other devices have, and a GPU without Triton, in
pieces of bounded size; all give the bits of `amq.packing.dequantize`.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cpu, triton
from amq.packing import PackedWeight, dequantize
from amq.rotation import rotate

PIECE = 1 << 22
"""Weights that plain torch makes on a GPU at once, at ninety bytes each."""

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
            triton.dequantize_rows(packed, out)
            if packed.rotation:
                out.copy_(rotate(out))
            return
        _warn(reason)
    step = max(1, PIECE // max(1, packed.in_features))
    for start in range(0, packed.out_features, step):
        out[start : start + step].copy_(dequantize(packed.rows(start, start + step)))


def dequantized(packed: PackedWeight) -> Tensor:
    """A new float32 tensor [out_features, in_features] on the device of `packed`."""
    out = torch.empty(packed.out_features, packed.in_features, device=packed.qweight.device)
    dequantize_into(packed, out)
    return out


@lru_cache
def _warn(reason: str) -> None:
    log.warning("weights are dequantized by plain torch, some twenty times slower than by Triton: %s", reason)
