"""Tensors as codes: uniform quantization with a range per channel, and the bytes that carry it.

A tensor is [channels, tokens] here: the range has to follow channels, some of which are thirty times as large as the
others (docs/decisions.md). Channel c has levels_c codes on a grid

    x̂ = 2^e · (low_c + code · step_c),    0 ≤ code < levels_c

low and step are fp16; e is one power of two for the whole tensor, which keeps them inside fp16's range for gradients of
1e-9 as for activations of 1e5.

Two kinds of grid. `ranged`: the channel's width in bits is agreed (a table that is sent when it changes), levels are
2^width, and low and step follow the least and the largest value, in groups of consecutive tokens if wanted. They are
rounded outwards, low down and step up, before the codes are made, so that the grid covers every value and the code of a
value is the nearest one: |x − x̂| ≤ 2^e · step_c / 2. `common`: one step for all channels around each channel's mean, as
many levels as the values need, which an entropy coder makes cheap; a channel that needs more than 256 levels, or whose
low fp16 cannot hold to half a step, has its own step. low is rounded to the nearest, so the ends may be off by a step.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat
from amq.packing import expand_groups, pack_codes, unpack_codes
from amq.split import coder
from amq.split.wire import NotFinite, WireError

MOST_WIDTH = FORMATS["int8"].bits
WIDTHS = tuple(range(1, MOST_WIDTH + 1))
WIRE_FORMATS: dict[int, BitFormat] = {
    width: FORMATS.get(f"int{width}") or BitFormat(f"int{width}", 1 << width, 8, width) for width in WIDTHS
}
"""Width → how codes of it are packed. Widths that no kernel knows are of the wire only."""
MOST_LEVELS = 1 << MOST_WIDTH
TOP = 14
"""The largest magnitude of a tensor is brought below 2^(TOP + 1): fp16 ends at 2^16, and its precision at 2^−14."""
LEAST_STEP, MOST_STEP = -10, TOP + 1
"""Of `common`, log2 in units of 2^e: finer than the least and wider than the most would change next to nothing."""
RAW32, RAW16, RANGED, COMMON = range(4)
"""Kinds of payload, its first byte."""
CODED = 1
"""Second byte: 1 where codes are entropy-coded, 0 where they are packed."""
HEAD = struct.Struct("<BBb")
STEP = struct.Struct("<f")


@dataclass(frozen=True)
class Codes:
    """A quantized tensor.

    codes: uint8 [channels, tokens]. levels: int32 [channels], of each channel's codes. low, step: fp16 [channels,
    groups]. exponent: e above. group: tokens that share a low and a step. common: the step of all channels, in units of
    2^e, or None for a ranged grid.
    """

    codes: Tensor
    levels: Tensor
    low: Tensor
    step: Tensor
    exponent: int
    group: int
    common: float | None = None

    def dequantize(self) -> Tensor:
        """float32 [channels, tokens]."""
        tokens = self.codes.shape[1]
        low = expand_groups(self.low.float(), self.group, tokens)
        step = expand_groups(self.step.float(), self.group, tokens)
        return self.codes.float().mul_(step).add_(low).mul_(2.0**self.exponent)


def _exponent(x: Tensor) -> int:
    largest = float(x.abs().max()) * (1 + 2.0**-10)  # twice this, one bit's step, must not round to fp16's infinity
    return max(-120, math.frexp(largest)[1] - 1 - TOP) if largest > 0 else 0


def _below(x: Tensor) -> Tensor:
    """The largest fp16 numbers that are not above x."""
    half = x.half()
    down = torch.nextafter(half, torch.full_like(half, -math.inf))
    return torch.where(half.float() > x, down, half)


def ranged(x: Tensor, levels: Tensor, group: int, symmetric: bool = False) -> Codes:
    """x on a grid from each channel's least to its largest value.

    x: float32 [channels, tokens], finite. levels: int32 [channels]. group: tokens per range.
    symmetric: from −max|x| to max|x| instead.
    """
    channels, tokens = x.shape
    exponent = _exponent(x)
    scaled = x * 2.0**-exponent
    padded = torch.nn.functional.pad(scaled, (0, -tokens % group), mode="replicate") if tokens % group else scaled
    groups = padded.view(channels, -1, group)
    high = groups.abs().amax(-1) if symmetric else groups.amax(-1)
    low = _below(-high if symmetric else groups.amin(-1))
    steps = (levels - 1).clamp(min=1).unsqueeze(1)
    step = -_below(-(high - low.float()) / steps)
    wide = expand_groups(step.float(), group, tokens)
    # the divisor is never 0 where the numerator is not: a channel of one value has low at or just below it
    codes = (scaled - expand_groups(low.float(), group, tokens)) / wide.clamp(min=torch.finfo(torch.float32).tiny)
    codes = codes.round_().clamp_(min=torch.zeros(()), max=(levels - 1).unsqueeze(1).float()).to(torch.uint8)
    return Codes(codes, levels, low, step, exponent, group)


def common(x: Tensor, step: float) -> Codes:
    """x on grids of one step around each channel's mean. step: in units of x; x: float32 [channels, tokens], finite."""
    exponent, tokens = _exponent(x), x.shape[1]
    scaled = x * 2.0**-exponent
    unit = min(max(math.ldexp(step, -exponent), 2.0**LEAST_STEP), 2.0**MOST_STEP)
    mean, least, most = scaled.mean(1), scaled.amin(1), scaled.amax(1)
    wide = (most - least) / unit + 2 > MOST_LEVELS
    own = torch.where(wide, -_below((least - most) / (MOST_LEVELS - 3)).float(), torch.full_like(mean, unit))
    under = ((mean - least) / own).sub_(0.5).ceil_().clamp_(min=0)
    exact = mean - under * own
    low = exact.half()
    far = (low.float() - exact).abs() > own / 2  # a large mean, a small step: from the least value up, as `ranged` does
    low = torch.where(far, _below(least), low)
    own = torch.where(far, -_below(-((most - low.float()) / (MOST_LEVELS - 1)).clamp(min=unit)).float(), own)
    wide |= far
    codes = ((scaled - low.float().unsqueeze(1)) / own.unsqueeze(1)).round_().clamp_(min=0, max=MOST_LEVELS - 1)
    levels = codes.amax(1).to(torch.int32) + 1
    levels = torch.where(wide, torch.full_like(levels, MOST_LEVELS), levels.clamp(max=MOST_LEVELS - 1))
    codes = torch.minimum(codes, (levels - 1).float().unsqueeze(1)).to(torch.uint8)
    return Codes(codes, levels, low.unsqueeze(1), own.unsqueeze(1), exponent, tokens, unit)


def pack(codes: Codes, coded: bool) -> bytes:
    """The payload of a quantized tensor."""
    kind = RANGED if codes.common is None else COMMON
    parts = [HEAD.pack(kind, CODED if coded else 0, codes.exponent)]
    if codes.common is None:
        parts += [_bytes(codes.low), _bytes(codes.step)]
    else:
        own = codes.step[codes.levels == MOST_LEVELS].half()
        parts += [STEP.pack(codes.common), _bytes((codes.levels - 1).to(torch.uint8)), _bytes(codes.low), _bytes(own)]
    if coded:
        center, scale = coder.fit(codes.codes, codes.levels)
        parts += [_bytes(center), _bytes(scale), coder.encode(codes.codes, codes.levels, center, scale)]
    else:
        widths = widths_of(codes.levels)
        parts += [_bytes(pack_codes(codes.codes[widths == width], f)) for width, f in WIRE_FORMATS.items()]
    return b"".join(parts)


def levels_of(widths: Tensor) -> Tensor:
    """Codes that channels of these widths have, int32 [channels]."""
    return (1 << widths).to(torch.int32)


def widths_of(levels: Tensor) -> Tensor:
    """Bits that each channel's codes need, int64; 0 for a channel of one level."""
    return torch.tensor([(level - 1).bit_length() for level in levels.tolist()])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Reader:
    """Takes a payload apart; raises WireError where it is not as long as what it says."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._at, self._what = memoryview(data), 0, what

    def take(self, count: int) -> memoryview:
        if count > len(self._data) - self._at:
            raise WireError(
                f"{self._what}: the payload ends after {len(self._data)} bytes, {self._at + count} are needed"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> memoryview:
        return self.take(len(self._data) - self._at)

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        count = math.prod(shape)
        data = self.take(count * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape) if count else torch.empty(shape, dtype=dtype)

    def end(self) -> None:
        if self._at != len(self._data):
            raise WireError(f"{self._what}: {len(self._data) - self._at} bytes follow the payload")


def unpack(data: bytes, levels: Tensor | None, tokens: int, channels: int, group: int, what: str) -> Tensor:
    """The tensor that a payload stands for, float32 [channels, tokens], whatever its kind.

    levels: int32 [channels], of ranged grids: the table in force, or None where none was sent yet.
    Raises WireError for bytes that no `pack` or `pack_raw` wrote; `what` names them.
    """
    reader = Reader(data, what)
    kind, coded, exponent = HEAD.unpack(reader.take(HEAD.size))
    if kind in (RAW32, RAW16) and not coded and not exponent:
        x = reader.tensor(torch.float32 if kind == RAW32 else torch.float16, tokens, channels).float().t()
        reader.end()
    elif kind in (RANGED, COMMON) and coded in (0, CODED):
        x = _unpack_codes(reader, kind, bool(coded), exponent, levels, tokens, channels, group, what).dequantize()
    else:
        raise WireError(f"{what}: no payload begins with the bytes {kind}, {coded}, {exponent}")
    if not bool(torch.isfinite(x).all()):
        raise WireError(f"{what} holds NaN or infinity")
    return x


def _unpack_codes(
    reader: Reader, kind: int, coded: bool, exponent: int, levels: Tensor | None, tokens: int, channels: int,
    group: int, what: str,
) -> Codes:  # fmt: skip
    if kind == RANGED:
        if levels is None:
            raise WireError(f"{what}: a quantized tensor came before the widths of its channels")
        groups = -(-tokens // group)
        low, step = (reader.tensor(torch.float16, channels, groups) for _ in range(2))
        made = Codes(torch.empty(0), levels, low, step, exponent, group)
    else:
        (unit,) = STEP.unpack(reader.take(STEP.size))
        levels = reader.tensor(torch.uint8, channels).to(torch.int32) + 1
        low = reader.tensor(torch.float16, channels, 1)
        wide = levels == MOST_LEVELS
        own = torch.full((channels,), unit)
        own[wide] = reader.tensor(torch.float16, int(wide.sum())).float()
        made = Codes(torch.empty(0), levels, low, own.unsqueeze(1), exponent, tokens, unit)
    if coded:
        center, scale = (reader.tensor(torch.uint8, channels) for _ in range(2))
        try:
            codes = coder.decode(reader.rest(), levels, center, scale, tokens)
        except AmqError as error:
            raise WireError(f"{what}: {error}") from None
    else:
        codes = _unpack_widths(reader, levels, tokens, channels, what)
    reader.end()
    return replace(made, codes=codes)


def _unpack_widths(reader: Reader, levels: Tensor, tokens: int, channels: int, what: str) -> Tensor:
    codes, widths = torch.zeros(channels, tokens, dtype=torch.uint8), widths_of(levels)
    for width, fmt in WIRE_FORMATS.items():
        rows = widths == width
        count = int(rows.sum())
        packed = reader.tensor(torch.uint8, count, fmt.row_bytes(tokens))
        codes[rows] = unpack_codes(packed, fmt, tokens)
    if bool((codes >= levels.unsqueeze(1)).any()):
        raise WireError(f"{what}: a code is beyond its channel's levels")
    return codes


def by_channel(x: Tensor) -> Tensor:
    """[batch, length, channels] of any dtype, on any device → float32 [channels, tokens] on the CPU."""
    return x.detach().reshape(-1, x.shape[-1]).t().float().cpu().contiguous()


def by_window(x: Tensor, length: int) -> Tensor:
    """Back again: [channels, tokens] → [batch, length, channels]."""
    return x.t().reshape(-1, length, x.shape[0])


def pack_raw(x: Tensor, half: bool) -> bytes:
    """x: float32 [channels, tokens], as it is or in fp16; on the wire token by token."""
    sent = x.half() if half else x
    check_finite(sent, "what is to be sent in float16, which ends at 65504,")
    return HEAD.pack(RAW16 if half else RAW32, 0, 0) + _bytes(sent.t())


def check_finite(x: Tensor, what: str) -> None:
    """Raises NotFinite naming the first channel that holds NaN or infinity. x: [channels, tokens]."""
    if not bool(torch.isfinite(x).all()):
        channel = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise NotFinite(f"{what} holds NaN or infinity in channel {channel}: nothing was sent; {NotFinite.REMEDY}")


def error_of(x: Tensor, width: int, group: int) -> Tensor:
    """Mean squared error of each channel, float32 [channels], when all are quantized with `width` bits."""
    levels = levels_of(torch.full((x.shape[0],), width))
    return (ranged(x, levels, group).dequantize() - x).square_().mean(1)
