"""Packed weights that leave nothing out, buffers that notice a write beside them, and equality to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from amq.formats import BitFormat, n_groups
from amq.packing import PackedWeight, pack_codes

GUARD = 0xA5  # in every byte around a buffer

SYNTHETIC = (
    BitFormat("ternary", levels=3, unit_codes=5, unit_bytes=1),
    BitFormat("five_levels", levels=5, unit_codes=6, unit_bytes=2),  # two spare bits
    BitFormat("spare", levels=8, unit_codes=5, unit_bytes=2),  # a power of two that is not a dense bitstream
    BitFormat("long", levels=4, unit_codes=28, unit_bytes=7),
    BitFormat("binary", levels=2, unit_codes=8, unit_bytes=1),
    BitFormat("seven_bits", levels=128, unit_codes=8, unit_bytes=7),
)


def random_packed(fmt: BitFormat, rows: int, in_features: int, group_size: int) -> PackedWeight:
    """Every code value where there is room, fractional zero points, scales of both signs down to fp16 subnormals."""
    generator = torch.Generator().manual_seed(rows * in_features + group_size)
    codes = torch.randint(0, fmt.levels, (rows, in_features), generator=generator, dtype=torch.uint8)
    shape = (rows, n_groups(in_features, group_size))
    scale = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-7, 2, shape, generator=generator)
    zero_point = torch.rand(shape, generator=generator) * fmt.max_code
    return PackedWeight(fmt, in_features, group_size, pack_codes(codes, fmt), scale.half(), zero_point.half())


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zero included."""
    torch.testing.assert_close(actual.view(torch.int32), expected.view(torch.int32), rtol=0, atol=0)


def guarded(tensor: Tensor, before: int = 64, after: int = 64) -> tuple[Tensor, Tensor]:
    """A copy of `tensor` at a non-zero storage offset with guard bytes around it, and the bytes of the whole buffer."""
    data = tensor.contiguous().view(torch.uint8).flatten()
    buffer = torch.full((before + data.numel() + after,), GUARD, dtype=torch.uint8)
    buffer[before : before + data.numel()] = data
    return buffer[before : before + data.numel()].view(tensor.dtype).view(tensor.shape), buffer
