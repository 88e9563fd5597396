"""Bit formats and the reference pack, unpack and dequantize: round trips, frozen bytes, stored sizes, errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES, BitFormat, check_group_size, get_format, n_groups, parse_formats
from amq.packing import PackedWeight, dequantize, pack_codes, unpack_codes

FORMAT_DOC = Path(__file__).resolve().parent.parent / "docs" / "format.md"
TERNARY = BitFormat("ternary", levels=3, unit_codes=5, unit_bytes=1)
ALL_FORMATS = (*FORMATS.values(), TERNARY, BitFormat("spare", levels=5, unit_codes=6, unit_bytes=2))
by_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)


def golden_codes(fmt: BitFormat) -> torch.Tensor:
    """One row of 19 codes that run through the levels in steps of 5, so that no unit repeats and the last is cut."""
    return torch.tensor([[(1 + 5 * i) % fmt.levels for i in range(19)]], dtype=torch.uint8)


def digits_row(fmt: BitFormat, codes: list[int]) -> bytes:
    """A packed row by the definition of a unit, in whole numbers: what a format without frozen bytes is held to."""
    row = b""
    for start in range(0, len(codes), fmt.unit_codes):
        unit = codes[start : start + fmt.unit_codes]
        largest = fmt.levels ** len(unit) - 1
        number = sum(code * fmt.levels**place for place, code in enumerate(unit))
        row += number.to_bytes((largest.bit_length() + 7) // 8, "little")
    return row


# Frozen on 2026-11-21: files are written in these bytes, and docs/format.md shows them. A change here breaks every
# checkpoint.
GOLDEN = {
    "int2": "3939393939",
    "int3": "f1509df1509df100",
    "int4": "610ba54fe9832dc7610b",
    "int5": "c12c58f527c94ddcc561d16e",
    "int6": "81b14095f691a93be3bd703091b501",
    "int8": "01060b10151a1f24292e33383d42474c51565b",
    "ternary": "2e8cb12e",
    "spare": "420f420f420f01",
}


def one_linear(fmt: BitFormat, rows: int = 3, in_features: int = 100, group_size: int = 64) -> PackedWeight:
    codes = torch.arange(rows * in_features).remainder(fmt.levels).to(torch.uint8).view(rows, in_features)
    groups = n_groups(in_features, group_size)
    scale = torch.linspace(0.01, 0.05, rows * groups).half().view(rows, groups)
    zero_point = torch.linspace(0.0, fmt.max_code, rows * groups).half().view(rows, groups)
    return PackedWeight(fmt, in_features, group_size, pack_codes(codes, fmt), scale, zero_point)


@by_format
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(fmt: BitFormat, data: st.DataObject) -> None:
    rows, in_features = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    flat = data.draw(st.lists(st.integers(0, fmt.max_code), min_size=rows * in_features, max_size=rows * in_features))
    codes = torch.tensor(flat, dtype=torch.uint8).view(rows, in_features)
    qweight = pack_codes(codes, fmt)
    assert qweight.shape == (rows, fmt.row_bytes(in_features)) and qweight.is_contiguous()
    assert torch.equal(unpack_codes(qweight, fmt, in_features), codes)


@by_format
def test_every_code_value_at_every_place_of_a_unit(fmt: BitFormat) -> None:
    codes = torch.arange(fmt.levels, dtype=torch.uint8)[:, None].repeat(1, 2 * fmt.unit_codes + 1)
    for in_features in range(1, codes.shape[1] + 1):
        part = codes[:, :in_features]
        assert torch.equal(unpack_codes(pack_codes(part, fmt), fmt, in_features), part)
    for place in range(fmt.unit_codes):  # one digit alone: neighbours must stay zero
        single = torch.zeros(fmt.levels, fmt.unit_codes, dtype=torch.uint8)
        single[:, place] = torch.arange(fmt.levels)
        assert torch.equal(unpack_codes(pack_codes(single, fmt), fmt, fmt.unit_codes), single)


@by_format
def test_golden_bytes(fmt: BitFormat) -> None:
    codes = golden_codes(fmt)
    packed = pack_codes(codes, fmt).numpy().tobytes()
    assert packed == digits_row(fmt, codes[0].tolist())
    assert packed.hex() == GOLDEN.get(fmt.name, packed.hex())


def test_no_format_with_golden_bytes_is_gone() -> None:
    assert set(GOLDEN) <= {fmt.name for fmt in ALL_FORMATS}


def test_documented_reader_reads_the_documented_bytes() -> None:
    """docs/format.md: its Python reader, its table of formats and its golden bytes; it has the frozen formats."""
    text = FORMAT_DOC.read_text()
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], namespace)
    for fmt in ALL_FORMATS:
        codes = golden_codes(fmt)
        data = pack_codes(codes, fmt).numpy().tobytes()
        assert namespace["read_row"](data, 19, fmt.levels, fmt.unit_codes, fmt.unit_bytes) == codes[0].tolist()
        assert f"`{data.hex(' ')}`" in text or fmt.name not in GOLDEN
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    for fmt in map(get_format, (row[0] for row in rows)):
        numbers = (fmt.levels, fmt.unit_codes, fmt.unit_bytes)
        assert (fmt.name, *map(str, numbers), f"{fmt.code_bits:g}") in rows
    assert {row[0] for row in rows} >= FORMATS.keys() & GOLDEN.keys()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_power_of_two_formats_are_a_little_endian_bitstream(fmt: BitFormat) -> None:
    bits = fmt.bits
    codes = golden_codes(fmt)[0].tolist()
    stream = sum(code << bits * place for place, code in enumerate(codes))
    expected = stream.to_bytes(-(-len(codes) * bits // 8), "little")
    assert pack_codes(golden_codes(fmt), fmt).numpy().tobytes() == expected


@by_format
def test_stored_bits_are_the_advertised_bits(fmt: BitFormat) -> None:
    in_features = 16 * fmt.unit_codes
    qweight = pack_codes(torch.zeros(3, in_features, dtype=torch.uint8), fmt)
    assert 8 * qweight.numel() / (3 * in_features) == fmt.code_bits


@by_format
def test_nbytes_is_the_size_of_the_tensors(fmt: BitFormat) -> None:
    for in_features in (1, 7, 100, 576):
        packed = one_linear(fmt, in_features=in_features)
        tensors = (packed.qweight, packed.scale, packed.zero_point)
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_int_formats_store_as_many_bits_as_their_name_says(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.code_bits == int(name.removeprefix("int")) and fmt.levels == 2**fmt.code_bits
    assert fmt.bits_per_weight(128) == fmt.code_bits + 0.25


def test_ternary_is_cheaper_than_two_bits() -> None:
    assert TERNARY.code_bits == 1.6
    assert TERNARY.row_bytes(7) == 2
    assert pack_codes(torch.full((1, 5), 2, dtype=torch.uint8), TERNARY).item() == 3**5 - 1


@by_format
def test_dequantize_is_the_formula(fmt: BitFormat) -> None:
    packed = one_linear(fmt)
    codes = unpack_codes(packed.qweight, fmt, packed.in_features)
    weight = dequantize(packed)
    for row in range(packed.out_features):
        for k in (0, 1, 63, 64, 99):
            zero_point, scale = packed.zero_point[row, k // 64].float(), packed.scale[row, k // 64].float()
            assert weight[row, k] == (codes[row, k].float() - zero_point) * scale
    assert torch.equal(dequantize(packed, torch.bfloat16), weight.bfloat16())


def test_rows_is_a_view_of_the_same_weight() -> None:
    packed = one_linear(FORMATS["int3"])
    part = packed.rows(1, 3)
    assert part.qweight.data_ptr() == packed.qweight[1:].data_ptr()
    assert torch.equal(dequantize(part), dequantize(packed)[1:3])


def test_packed_weight_refuses_tensors_that_do_not_fit() -> None:
    good = one_linear(FORMATS["int3"])
    fields = {name: getattr(good, name) for name in ("qweight", "scale", "zero_point")}
    bad = (
        ({"qweight": good.qweight[:, :-1]}, r"qweight must be torch.uint8 \[3, 38\], got torch.uint8 \[3, 37\]"),
        ({"qweight": good.qweight.int()}, r"qweight must be torch.uint8 .* got torch.int32"),
        ({"qweight": good.qweight[0]}, r"qweight must be .* got torch.uint8 \[38\]"),
        ({"scale": good.scale.float()}, r"int3 weight .* scale must be torch.float16 \[3, 2\], got torch.float32"),
        ({"scale": good.scale[:2]}, r"scale must be torch.float16 \[3, 2\], got torch.float16 \[2, 2\]"),
        ({"zero_point": good.zero_point[:, :1]}, r"zero_point must be .* got torch.float16 \[3, 1\]"),
    )
    for change, message in bad:
        with pytest.raises(AmqError, match=message):
            PackedWeight(good.format, 100, 64, **(fields | change))
    with pytest.raises(AmqError, match="group size 48 is not supported: expected one of 32, 64, 128"):
        PackedWeight(good.format, 100, 48, **fields)


def test_pack_refuses_what_is_not_a_code() -> None:
    with pytest.raises(AmqError, match="int2 holds codes up to 3, got 4"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), FORMATS["int2"])
    with pytest.raises(AmqError, match="codes must be uint8"):
        pack_codes(torch.zeros(2, 2), FORMATS["int2"])
    with pytest.raises(AmqError, match="codes must be uint8"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), FORMATS["int2"])


@pytest.mark.parametrize(
    ("numbers", "message"),
    (
        ((1, 8, 1), r"levels must be in \[2, 256\]"),
        ((257, 1, 2), r"levels must be in \[2, 256\]"),
        ((8, 8, 4), "8 codes of 8 levels need 3 bytes, but unit_bytes is 4"),
        ((3, 6, 1), "6 codes of 3 levels need 2 bytes"),
        ((256, 8, 8), r"unit_bytes must be in \[1, 7\]"),
    ),
)
def test_a_record_that_contradicts_itself_is_refused(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(AmqError, match=message):
        BitFormat("odd", *numbers)


def test_lookups() -> None:
    assert get_format("int3") is FORMATS["int3"]
    with pytest.raises(AmqError, match="unknown format 'int9': expected one of int2, int3"):
        get_format("int9")
    assert [f.name for f in parse_formats(" int4,int2, int4")] == ["int2", "int4"]
    with pytest.raises(AmqError, match="no format in ' , '"):
        parse_formats(" , ")
    assert [check_group_size(g) for g in GROUP_SIZES] == list(GROUP_SIZES)
    assert [n_groups(k, 64) for k in (1, 64, 65)] == [1, 1, 2]
