"""Bit formats: the only place where a bit-width is declared (standard library only; setup.py reads this file).

A format says how the unsigned codes of one weight row become bytes. Three integers define the layout: a *unit* is
`unit_codes` codes, written as one little-endian integer of `unit_bytes` bytes whose base-`levels` digits are the codes,
first code in the lowest digit:

    unit = code[0] + code[1]·levels + code[2]·levels² + …          (then little-endian bytes)

For power-of-two levels that is the dense little-endian bitstream that GPTQ, AutoRound and MLX use too. A row whose
length is not a multiple of `unit_codes` ends with a shorter unit, cut to the bytes that its codes need. Everything else
(pack, unpack, stored bits, checkpoint metadata, tests, benchmarks, native kernels) is derived from these records;
adding a format is adding one line here (docs/add_a_format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from amq.errors import AmqError

GROUP_SIZES = (32, 64, 128)
"""Supported group sizes: consecutive input features that share one scale and one zero point."""

GROUP_BYTES = 4
"""Stored per group besides the codes: one scale and one zero_point, both IEEE fp16."""


@dataclass(frozen=True)
class BitFormat:
    """How one row of codes in `[0, levels)` is stored; see the module text for the layout."""

    name: str
    levels: int
    unit_codes: int
    unit_bytes: int

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise AmqError(f"format {self.name}: levels must be in [2, 256] (codes are uint8), got {self.levels}")
        if not 1 <= self.unit_bytes <= 7:
            raise AmqError(
                f"format {self.name}: unit_bytes must be in [1, 7] (a unit fits an int64), got {self.unit_bytes}"
            )
        if self._bytes_for(self.unit_codes) != self.unit_bytes:
            raise AmqError(
                f"format {self.name}: {self.unit_codes} codes of {self.levels} levels need "
                f"{self._bytes_for(self.unit_codes)} bytes, but unit_bytes is {self.unit_bytes}"
            )

    def _bytes_for(self, codes: int) -> int:
        """Bytes that the largest value of `codes` base-`levels` digits needs."""
        return ((self.levels**codes - 1).bit_length() + 7) // 8

    @property
    def max_code(self) -> int:
        return self.levels - 1

    @property
    def bits(self) -> int:
        """Bits that one code needs; where `is_dense`, what it takes."""
        return self.max_code.bit_length()

    @property
    def is_dense(self) -> bool:
        """Whether a packed row is one bitstream: a power of two of levels, and no spare bits in a unit."""
        return self.levels == 1 << self.bits and 8 * self.unit_bytes == self.unit_codes * self.bits

    @property
    def code_bits(self) -> float:
        """Stored bits per code, scale and zero point not counted."""
        return 8 * self.unit_bytes / self.unit_codes

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one packed row of `in_features` codes."""
        units, rest = divmod(in_features, self.unit_codes)
        return units * self.unit_bytes + (self._bytes_for(rest) if rest else 0)

    def stored_bytes(self, out_features: int, in_features: int, group_size: int) -> int:
        """Bytes of a whole linear: codes, scales and zero points; the last group of a row may be ragged."""
        return out_features * (self.row_bytes(in_features) + n_groups(in_features, group_size) * GROUP_BYTES)

    def bits_per_weight(self, group_size: int) -> float:
        """Nominal bits per weight, `code_bits + 32/group_size`: what a linear costs whose rows fill their groups."""
        return self.code_bits + 8 * GROUP_BYTES / group_size


def n_groups(in_features: int, group_size: int) -> int:
    """Groups in one row; the last one may hold fewer than `group_size` features."""
    return -(-in_features // group_size)


FORMATS: dict[str, BitFormat] = {
    f.name: f
    for f in (
        BitFormat("int2", levels=4, unit_codes=4, unit_bytes=1),
        BitFormat("int3", levels=8, unit_codes=8, unit_bytes=3),
        BitFormat("int4", levels=16, unit_codes=2, unit_bytes=1),
        BitFormat("int5", levels=32, unit_codes=8, unit_bytes=5),
        BitFormat("int6", levels=64, unit_codes=4, unit_bytes=3),
        BitFormat("int8", levels=256, unit_codes=1, unit_bytes=1),
    )
}
"""Every known format by name, cheapest first."""


def native_header() -> str:
    """amq_formats.h: the records for C++ and CUDA, a macro list `X(name, levels, unit_codes, unit_bytes)`."""
    entries = " ".join(f"X({f.name}, {f.levels}, {f.unit_codes}, {f.unit_bytes})" for f in FORMATS.values())
    return f"// Written from amq/formats.py.\n#pragma once\n#define AMQ_FORMATS(X) {entries}\n"


@dataclass(frozen=True)
class Kept:
    """What a linear is stored as that is not quantized: 16 bits a weight, no scales, under its own name.

    It says its size as a `BitFormat` does, and has no codes: no bank, kernel or quantizer knows it.
    """

    name: str = "16bit"
    code_bits: float = 16.0

    def row_bytes(self, in_features: int) -> int:
        return 2 * in_features

    def stored_bytes(self, out_features: int, in_features: int, group_size: int) -> int:
        return out_features * self.row_bytes(in_features)

    def bits_per_weight(self, group_size: int) -> float:
        return self.code_bits


KEPT = Kept()
STORED: dict[str, BitFormat | Kept] = {**FORMATS, KEPT.name: KEPT}
"""Everything that a configuration may say of a linear, by name, cheapest first."""
NO_ROTATION = "none"
"""What files and flags call that no input is rotated (`amq.rotation`)."""


def get_stored(name: str) -> BitFormat | Kept:
    """What a configuration calls `name`: a format, or `KEPT`; else an error that lists them."""
    try:
        return STORED[name]
    except (KeyError, TypeError):
        raise AmqError(
            f"unknown format {name!r}: expected one of {', '.join(FORMATS)}, or {KEPT.name} for a linear that is to "
            "stay as it is"
        ) from None


def quantized_formats(formats: Mapping[str, str]) -> dict[str, str]:
    """A configuration's {linear: format} without the linears that are kept in 16 bits."""
    return {linear: name for linear, name in formats.items() if name != KEPT.name}


def get_format(name: str) -> BitFormat:
    """The format called `name`, or an error that lists the known ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise AmqError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}") from None


def parse_formats(text: str) -> tuple[BitFormat, ...]:
    """`"int2,int3,int4"` → records, cheapest first, without repeats."""
    names = {part.strip() for part in text.split(",") if part.strip()}
    if not names:
        raise AmqError(f"no format in {text!r}: expected a comma-separated list of {', '.join(FORMATS)}")
    return tuple(sorted((get_format(n) for n in names), key=lambda f: f.code_bits))


def check_group_size(group_size: int) -> int:
    """`group_size` if it is supported, else an error that lists the supported ones."""
    if group_size not in GROUP_SIZES:
        raise AmqError(f"group size {group_size} is not supported: expected one of {', '.join(map(str, GROUP_SIZES))}")
    return group_size
