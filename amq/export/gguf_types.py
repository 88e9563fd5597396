"""Which GGUF block type holds a packed weight, and its bytes.

The types used here have blocks of 32 weights with a step d in fp16, and either a fixed offset, w = d·(code − offset),
or a minimum m in fp16, w = d·code + m. A group of 32, 64 or 128 is whole blocks that repeat its scale, so that our
codes are copied: to a type with an offset where all zero points are whole numbers that its levels can hold (exact),
else to one with a minimum, m = −zero_point·scale (exact but for that product's rounding to fp16). Only a weight that
neither can hold is quantized again, to `REQUANTIZED`. The k-quants and i-quants of llama.cpp have grids of their own,
which hold none of our formats exactly, and need rows of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amq.model.gguf.orders import BLOCK
from amq.packing import PackedWeight, dequantize, unpack_codes


@dataclass(frozen=True)
class BlockType:
    """A GGUF type with blocks of `BLOCK` weights.

    name: in `gguf.GGMLQuantizationType`. levels: codes are in [0, levels).
    offset: of w = d·(code − offset), or None: w = d·code + m.
    pack: codes uint8 [blocks, 32] → their bytes, uint8 [blocks, n], without d and m.
    """

    name: str
    levels: int
    offset: int | None
    pack: Callable[[Tensor], Tensor]


def _nibbles(codes: Tensor) -> Tensor:
    """The low four bits: byte i holds code i below code i + 16."""
    low = codes & 0xF
    return low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << 4


def _five_bits(codes: Tensor) -> Tensor:
    """Four bytes with the fifth bit of every code, then the nibbles."""
    bit = torch.arange(8, dtype=torch.uint8)
    high = ((codes >> 4).view(-1, BLOCK // 8, 8) << bit).sum(-1, dtype=torch.uint8)
    return torch.cat([high, _nibbles(codes)], dim=1)


def _signed_bytes(codes: Tensor) -> Tensor:
    """code − 128 as int8: the same byte with its top bit flipped."""
    return codes ^ 0x80


TYPES = (
    BlockType("Q4_0", 16, 8, _nibbles),
    BlockType("Q4_1", 16, None, _nibbles),
    BlockType("Q5_0", 32, 16, _five_bits),
    BlockType("Q5_1", 32, None, _five_bits),
    BlockType("Q8_0", 256, 128, _signed_bytes),
)
"""By size, smallest first."""
REQUANTIZED = "Q8_0"
"""For what no type of `TYPES` holds: 6 and 8 bits with fractional zero points."""


def find_type(weights: Sequence[PackedWeight]) -> BlockType | None:
    """The smallest type that takes the codes of all `weights` as they are, or None."""
    return next((kind for kind in TYPES if all(_holds(kind, packed) for packed in weights)), None)


def _holds(kind: BlockType, packed: PackedWeight) -> bool:
    if kind.offset is None:
        return packed.format.levels <= kind.levels
    zero_point = packed.zero_point.float()
    low, high = (float(end) for end in zero_point.aminmax()) if zero_point.numel() else (0.0, 0.0)
    fits = kind.offset - high >= 0 and packed.format.max_code - low + kind.offset < kind.levels
    return fits and bool((zero_point == zero_point.round()).all())


def encode(packed: PackedWeight, kind: BlockType | None) -> np.ndarray:
    """The GGUF bytes of `packed`, uint8 [out_features, row bytes]; in_features is a multiple of 32.

    kind: as `find_type` returned it; None quantizes again, to `REQUANTIZED`.
    """
    if kind is None:
        import gguf

        return gguf.quantize(dequantize(packed).numpy(), gguf.GGMLQuantizationType[REQUANTIZED])
    codes = unpack_codes(packed.qweight, packed.format, packed.in_features).view(-1, BLOCK)
    step, zero_point = (_per_block(t, packed) for t in (packed.scale, packed.zero_point))
    heads = [step]
    if kind.offset is None:
        heads.append((-zero_point.float() * step.float()).half())
    else:
        codes = (codes.short() + (kind.offset - zero_point).short()).to(torch.uint8)
    heads = [head.contiguous().view(torch.uint8) for head in heads]
    return torch.cat([*heads, kind.pack(codes)], dim=1).view(packed.out_features, -1).numpy()


def decode(data: np.ndarray, name: str) -> np.ndarray:
    """float32 weights of the GGUF type `name`, by the gguf package."""
    import gguf

    return gguf.dequantize(data, gguf.GGMLQuantizationType[name])


def _per_block(per_group: Tensor, packed: PackedWeight) -> Tensor:
    """[rows, groups] → [rows · blocks, 1]: what the group of each block has; a last group may be ragged."""
    blocks = per_group.repeat_interleave(packed.group_size // BLOCK, dim=1)[:, : packed.in_features // BLOCK]
    return blocks.reshape(-1, 1)
