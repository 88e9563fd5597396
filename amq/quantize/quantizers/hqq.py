"""Half-quadratic quantization (Badri and Shaji, 2023), the paper's proxy, through the `hqq` library's own solver.

Only the solver is used (`bitpack=False`): the library stores 3 bits in 3.2. Its solver wants whole groups, so a ragged
last group is solved on its own. Where the weights are on a CUDA device it works there, in fp16: that is its choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import packed
from amq.util.extras import needs


def quantize(
    weights: Sequence[Tensor],
    formats: Sequence[BitFormat],
    group_size: int,
    gram: Tensor | None = None,
    zero_points: str = "fractional",
) -> list[dict[str, PackedWeight]]:
    """See `amq.quantize.quantizers.Quantizer`; `gram` is not used."""
    if zero_points != "fractional":
        raise AmqError(
            f"the hqq library solves for fractional zero points, not {zero_points} ones: use rtn, awq or gptq"
        )
    return [{fmt.name: _one(weight, fmt, group_size) for fmt in formats} for weight in weights]


def _one(weight: Tensor, fmt: BitFormat, group_size: int) -> PackedWeight:
    whole = weight.shape[1] - weight.shape[1] % group_size
    parts = [(weight[:, :whole], group_size)] if whole else []
    if whole < weight.shape[1]:
        parts.append((weight[:, whole:], weight.shape[1] - whole))
    solved = [_solve(part, fmt, size) for part, size in parts]
    codes, scale, zero_point = (torch.cat(tensors, dim=1) for tensors in zip(*solved, strict=True))
    return packed(codes, scale, zero_point, fmt, group_size)


def _solve(weight: Tensor, fmt: BitFormat, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, in_features], scale and zero_point [rows, n_groups] of a weight that fills its groups."""
    with needs("search", "the quantizer hqq"):
        from hqq.core.quantize import Quantizer

    bits = fmt.bits
    if fmt.levels != 2**bits or bits not in Quantizer.SUPPORTED_BITS:
        raise AmqError(f"the hqq library has no solver for format {fmt.name}: use --proxy rtn or gptq")
    rows = weight.shape[0]
    codes, meta = Quantizer.quantize(
        weight.float().contiguous(), nbits=bits, group_size=group_size, axis=1, bitpack=False, device=str(weight.device)
    )
    scale, zero_point = meta["scale"].view(rows, -1).half(), meta["zero"].view(rows, -1).half()
    if not bool(torch.isfinite(scale).all() and torch.isfinite(zero_point).all()):
        raise AmqError(
            f"hqq gave a {fmt.name} grid that fp16 cannot hold (group size {group_size}): use --proxy rtn or gptq"
        )
    return codes.view(rows, -1), scale, zero_point
