"""PackedWeight, PreparedWeight, and the plain-torch pack, unpack and dequantize that specify it.

    W[n, k] ≈ (codes[n, k] − zero_point[n, k // group_size]) · scale[n, k // group_size]

`codes` are uint8 in `[0, levels)`; `scale` and `zero_point` are fp16, and zero_point is in code units and may be
fractional. Of a rotated weight this is W H instead of W, with H of `amq.rotation`. The bytes of `qweight` follow
`amq/formats.py`. This file is the slow obvious version: kernels are tested against it, and the on-disk format
(docs/format.md) is what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, check_group_size, n_groups
from amq.rotation import ROTATIONS, check_width, rotate

PARTS = ("qweight", "scale", "zero_point")
"""The tensors of a packed weight, fields of `PackedWeight`; files call them `LINEAR.PART`."""


def part_names(linear: str) -> list[str]:
    return [f"{linear}.{part}" for part in PARTS]


@dataclass(frozen=True)
class PackedWeight:
    """One linear in one format.

    format: the record in `amq.formats.FORMATS`.
    in_features: codes per row; any positive number.
    group_size: consecutive codes of a row that share one scale and zero point; the last group may be ragged.
    qweight: uint8 [out_features, format.row_bytes(in_features)].
    scale: fp16 [out_features, n_groups].
    zero_point: fp16 [out_features, n_groups], in code units.
    rotation: 0, or the width of the blocks of H where the codes are of W H; a width divides `in_features` then.
    """

    format: BitFormat
    in_features: int
    group_size: int
    qweight: Tensor
    scale: Tensor
    zero_point: Tensor
    rotation: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_rotation(self.rotation, self.in_features, f"{self.format.name} weight")
        rows = self.qweight.shape[0] if self.qweight.ndim == 2 else -1
        groups = n_groups(self.in_features, check_group_size(self.group_size))
        expected = {
            "qweight": (torch.uint8, (rows, self.format.row_bytes(self.in_features))),
            "scale": (torch.float16, (rows, groups)),
            "zero_point": (torch.float16, (rows, groups)),
        }
        for part, tensor in self.parts.items():
            dtype, shape = expected[part]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise AmqError(
                    f"{self.format.name} weight with {self.in_features} input features at group {self.group_size}: "
                    f"{part} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and zero points."""
        return self.format.stored_bytes(self.out_features, self.in_features, self.group_size)

    @property
    def parts(self) -> dict[str, Tensor]:
        """{name of `PARTS`: tensor}, in their order."""
        return {part: getattr(self, part) for part in PARTS}

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Output rows `start` to `stop`, as a view: rows are independent in every format."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> PackedWeight:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """The weight with `change` applied to each part; row n of a part must stay a row."""
        parts = (change(tensor) for tensor in self.parts.values())
        return PackedWeight(self.format, self.in_features, self.group_size, *parts, rotation=self.rotation)


@dataclass(frozen=True)
class PreparedWeight:
    """One linear in the layout of the backend that `amq.kernels.backends.prepare` made it for.

    backend: a name in `amq.kernels.backends.BACKENDS`.
    data: uint8, one dimension; the layout is the backend's own.
    rotation: of the packed weight; who multiplies rotates x.
    """

    backend: str
    format: BitFormat
    out_features: int
    in_features: int
    group_size: int
    data: Tensor
    rotation: int = 0

    @classmethod
    def of(cls, packed: PackedWeight, backend: str, data: Tensor) -> PreparedWeight:
        """`packed`, of which `backend` made `data`."""
        shape = packed.out_features, packed.in_features
        return cls(backend, packed.format, *shape, packed.group_size, data, packed.rotation)

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def check_rotation(rotation: int, in_features: int, name: str) -> None:
    """Raises AmqError unless inputs of `in_features` features can be rotated by `rotation`."""
    if rotation not in ROTATIONS:
        raise AmqError(f"{name}: a rotation is {' or '.join(map(str, ROTATIONS))} features wide, got {rotation}")
    if rotation:
        check_width(in_features, name)


def check_fused(weights: Sequence[PreparedWeight], fields: Sequence[str], name: str) -> None:
    """That there are weights, and that they agree in `fields`: what one call of the linear `name` can multiply."""
    if not weights:
        raise AmqError(f"{name}: expected at least one weight, got none")
    for weight in weights[1:]:
        for shared in fields:
            expected, got = getattr(weights[0], shared), getattr(weight, shared)
            if got != expected:
                raise AmqError(f"{name}: fused linears must share {shared}; expected {expected}, got {got}")


def pack_codes(codes: Tensor, fmt: BitFormat) -> Tensor:
    """uint8 codes [out_features, in_features] → uint8 qweight [out_features, fmt.row_bytes(in_features)]."""
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise AmqError(f"codes must be uint8 [out_features, in_features], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) > fmt.max_code:
        raise AmqError(f"{fmt.name} holds codes up to {fmt.max_code}, got {int(codes.max())}")
    in_features = codes.shape[1]
    padding = -in_features % fmt.unit_codes
    units = torch.nn.functional.pad(codes, (0, padding)).unflatten(1, (-1, fmt.unit_codes)).to(torch.int64)
    value = (units * _powers(fmt.levels, fmt.unit_codes, codes.device)).sum(-1)  # [rows, units]
    shifts = 8 * torch.arange(fmt.unit_bytes, device=codes.device)
    unit_bytes = (value.unsqueeze(-1) >> shifts) & 0xFF  # [rows, units, unit_bytes]
    return unit_bytes.flatten(1)[:, : fmt.row_bytes(in_features)].to(torch.uint8).contiguous()


def unpack_codes(qweight: Tensor, fmt: BitFormat, in_features: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [out_features, in_features]."""
    padding = -qweight.shape[1] % fmt.unit_bytes
    unit_bytes = torch.nn.functional.pad(qweight, (0, padding)).unflatten(1, (-1, fmt.unit_bytes)).to(torch.int64)
    value = (unit_bytes << 8 * torch.arange(fmt.unit_bytes, device=qweight.device)).sum(-1, keepdim=True)
    codes = (value // _powers(fmt.levels, fmt.unit_codes, qweight.device)) % fmt.levels  # [rows, units, unit_codes]
    return codes.flatten(1)[:, :in_features].to(torch.uint8).contiguous()


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    return base ** torch.arange(count, dtype=torch.int64, device=device)


def expand_groups(per_group: Tensor, group_size: int, in_features: int) -> Tensor:
    """[rows, n_groups] → [rows, in_features]: each group's value at each of its input features."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight [out_features, in_features], rotated back where it is rotated; in float32, rounded once to `dtype`."""
    codes = unpack_codes(packed.qweight, packed.format, packed.in_features).float()
    scale = expand_groups(packed.scale.float(), packed.group_size, packed.in_features)
    zero_point = expand_groups(packed.zero_point.float(), packed.group_size, packed.in_features)
    weight = (codes - zero_point) * scale
    return (rotate(weight) if packed.rotation else weight).to(dtype)
