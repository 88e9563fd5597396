"""Tensors as codes for the wire: the grid covers every value, payloads read back, and damage is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.packing import expand_groups
from amq.split import quantizer
from amq.split.quantizer import COMMON, HEAD, MOST_LEVELS, RANGED, WIDTHS, WIRE_FORMATS, Codes
from amq.split.wire import WireError

CHANNELS, TOKENS = 24, 40
SCALES = (1e-9, 1e-3, 1.0, 6e4, 1e9)


def tensor(seed: int = 0, scale: float = 1.0, tokens: int = TOKENS) -> Tensor:
    """Channels of very different size and mean, one constant, one zero, one with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(CHANNELS, tokens, generator=generator) * torch.logspace(-2, 2, CHANNELS).unsqueeze(1)
    x += 30 * torch.randn(CHANNELS, 1, generator=generator)
    x[0], x[1], x[2, 3] = 7.3, 0.0, 900.0
    return x * scale


def levels(width: int) -> Tensor:
    return torch.full((CHANNELS,), 1 << width, dtype=torch.int32)


def mixed() -> Tensor:
    """Every width, as levels."""
    return torch.tensor([1 << WIDTHS[c % len(WIDTHS)] for c in range(CHANNELS)], dtype=torch.int32)


def half_steps(codes: Codes) -> Tensor:
    """What a value may be off by: half a step of its group, and float32's rounding of low + code · step."""
    step = expand_groups(codes.step.float(), codes.group, codes.codes.shape[1])
    low = expand_groups(codes.low.float(), codes.group, codes.codes.shape[1])
    rounding = 4 * torch.finfo(torch.float32).eps * (low.abs() + step * codes.levels.unsqueeze(1))
    return (step / 2 + rounding) * 2.0**codes.exponent


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_covers_every_value(width: int, scale: float, symmetric: bool) -> None:
    x = tensor(width, scale)
    for group in (TOKENS, 16):  # the last group of 16 is ragged
        codes = quantizer.ranged(x, levels(width), group, symmetric)
        assert bool(((codes.dequantize() - x).abs() <= half_steps(codes)).all())
        assert int(codes.codes.max()) <= (1 << width) - 1


def test_a_range_is_hardly_wider_than_its_values() -> None:
    """low and step are rounded outwards to fp16: by 2⁻¹⁰ of themselves each, and never by more."""
    x = tensor()
    codes = quantizer.ranged(x, levels(3), TOKENS)
    low, step = (t.float().squeeze(1) * 2.0**codes.exponent for t in (codes.low, codes.step))
    span, top = x.amax(1) - x.amin(1), x.abs().amax(1)
    assert bool((x.amin(1) - low <= 2**-10 * top).all() and (low <= x.amin(1)).all())
    assert bool((step * 7 - span <= 2**-10 * (2 * top + span)).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_step_of_one_bit_is_a_float16(symmetric: bool) -> None:
    """From −m to m it is 2m, where m lies just below a power of two: fp16's infinity, were it not for the exponent."""
    for largest in (32767.0, 32744.0, 32736.0, 32735.0, 2.0**-20 * 32767, 1.0):
        x = torch.tensor([[largest, -largest, 0.0], [1.0, 0.5, 0.0]])
        codes = quantizer.ranged(x, torch.tensor([2, 2], dtype=torch.int32), 3, symmetric)
        assert bool((codes.dequantize() - x).abs().le(codes.step.float() * 2.0**codes.exponent * 0.5).all())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("step", [1.0, 0.3, 0.05, 0.01, 1e-4])
def test_a_channel_far_from_zero_is_not_cut_off(step: float, scale: float) -> None:
    """fp16's low is a multiple of the step's many times there."""
    offsets = torch.tensor([0.0, 1e3, -1e3, 3e3, 3e3]).unsqueeze(1)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) + offsets
    x[4] = 3e3 + 1 / 3
    x *= scale
    codes = quantizer.common(x, step * scale)
    own = codes.step.float() * 2.0**codes.exponent
    assert bool(((codes.dequantize() - x).abs() <= own + 2**-20 * x.abs()).all())
    span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True) + 2**-10 * x.abs().amax(1, keepdim=True)
    assert bool((own <= torch.maximum(1.01 * span / 253, torch.tensor(1.01 * step * scale))).all())


def test_a_step_wider_than_the_tensor_is_one_that_fits() -> None:
    x = tensor(3)
    for exponent in (20, 127):
        codes = quantizer.common(x, 2.0**exponent)
        assert codes.common == 2.0**quantizer.MOST_STEP and bool(torch.isfinite(codes.low).all())
        assert torch.equal(read(quantizer.pack(codes, True), codes), codes.dequantize())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("step", [0.05, 1.0, 40.0])
def test_one_step_for_all_channels(step: float, scale: float) -> None:
    x = tensor(1, scale)
    codes = quantizer.common(x, step * scale)
    wide = codes.levels == MOST_LEVELS
    assert bool(((codes.dequantize() - x).abs()[~wide] <= half_steps(codes)[~wide] + 2**-10 * x.abs()[~wide]).all())
    assert bool(((codes.dequantize() - x).abs()[wide] <= 1.01 * half_steps(codes)[wide]).all())
    narrow = (x.amax(1) - x.amin(1) < step * scale / 2) & ~wide
    assert bool((codes.levels[narrow] <= 2).all()), "a channel that varies by less than a step costs next to nothing"
    assert bool(wide.any()) == (step < 40)


def made(kind: str) -> Codes:
    x = tensor(2)
    return {
        "ranged": lambda: quantizer.ranged(x, mixed(), TOKENS),
        "groups": lambda: quantizer.ranged(x, mixed(), 16),
        "common": lambda: quantizer.common(x, 1.0),
        "wide": lambda: quantizer.common(x, 0.02),
    }[kind]()


KINDS = ("ranged", "groups", "common", "wide")


def read(payload: bytes, codes: Codes) -> Tensor:
    table = None if codes.common is not None else codes.levels
    return quantizer.unpack(payload, table, TOKENS, CHANNELS, codes.group, "the tensor")


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_payloads_read_back(kind: str, coded: bool) -> None:
    codes = made(kind)
    assert torch.equal(read(quantizer.pack(codes, coded), codes), codes.dequantize())


def test_the_size_of_a_packed_payload() -> None:
    """Head, low and step of each group, and each width's rows as the project packs them."""
    for kind, groups in (("ranged", 1), ("groups", 3)):
        codes = made(kind)
        rows = sum(WIRE_FORMATS[int(w)].row_bytes(TOKENS) for w in quantizer.widths_of(codes.levels))
        assert len(quantizer.pack(codes, False)) == HEAD.size + 4 * CHANNELS * groups + rows
        assert rows == sum(math.ceil(TOKENS * int(w) / 8) for w in quantizer.widths_of(codes.levels))


def test_formats_of_the_wire_are_dense_and_those_of_the_project() -> None:
    assert tuple(WIRE_FORMATS) == WIDTHS == tuple(range(1, 9))
    for width, fmt in WIRE_FORMATS.items():
        assert fmt.bits == width and fmt.is_dense
        assert FORMATS.get(fmt.name, fmt) is fmt


@pytest.mark.parametrize("half", [False, True])
def test_raw_tensors(half: bool) -> None:
    x = tensor(3)
    payload = quantizer.pack_raw(x, half)
    assert len(payload) == HEAD.size + x.numel() * (2 if half else 4)
    expected = x.half().float() if half else x
    assert torch.equal(quantizer.unpack(payload, None, TOKENS, CHANNELS, TOKENS, "x"), expected)


def test_what_cannot_be_sent_is_named() -> None:
    x = tensor()
    x[5, 2] = math.nan
    with pytest.raises(AmqError, match="what enters cut 0 holds NaN or infinity in channel 5: nothing was sent"):
        quantizer.check_finite(x, "what enters cut 0")
    with pytest.raises(AmqError, match="float16, which ends at 65504, holds NaN or infinity in channel 9"):
        quantizer.pack_raw(torch.zeros(12, 3).index_fill(0, torch.tensor([9]), 1e5), True)


def damaged(codes: Codes, payload: bytes) -> list[tuple[bytes, str]]:
    kind = payload[0]
    return [
        (payload[:-1], "the payload ends after|a code is beyond|bytes"),
        (payload + b"\0", "1 bytes follow the payload|ends with"),
        (payload[:2], "the payload ends after 2 bytes, 3 are needed"),
        (bytes([9]) + payload[1:], "no payload begins with the bytes 9"),
        (bytes([kind, 7]) + payload[2:], f"no payload begins with the bytes {kind}, 7"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named(kind: str) -> None:
    codes = made(kind)
    for data, message in damaged(codes, quantizer.pack(codes, False)):
        with pytest.raises(WireError, match=f"the tensor: .*({message})"):
            read(data, codes)


def test_wrong_values_are_named() -> None:
    infinite = HEAD.pack(quantizer.RAW32, 0, 0) + torch.full((TOKENS, CHANNELS), math.inf).numpy().tobytes()
    with pytest.raises(WireError, match="the tensor holds NaN or infinity"):
        quantizer.unpack(infinite, None, TOKENS, CHANNELS, TOKENS, "the tensor")
    codes = made("ranged")
    with pytest.raises(WireError, match="a quantized tensor came before the widths of its channels"):
        quantizer.unpack(quantizer.pack(codes, False), None, TOKENS, CHANNELS, TOKENS, "the tensor")
    one = quantizer.common(torch.linspace(0, 2, TOKENS).expand(CHANNELS, -1).contiguous(), 1.0)
    assert set(one.levels.tolist()) == {3}
    payload = bytearray(quantizer.pack(one, False))
    payload[-1] = 0xFF  # codes of 3 where there are three levels
    with pytest.raises(WireError, match="a code is beyond its channel's levels"):
        read(bytes(payload), one)


def test_both_kinds_say_which_they_are() -> None:
    assert quantizer.pack(made("ranged"), False)[0] == RANGED
    assert quantizer.pack(made("common"), False)[0] == COMMON
