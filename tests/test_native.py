"""`amq._cpu` against the torch reference, bit for bit: every compiled format, group size, instruction set, ragged row.

The decoders are also compiled here for made-up formats (base 3, spare bits, 1 and 7 bits), because "any format" is
their promise and `FORMATS` happens to hold only dense powers of two.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.packed import GUARD, SYNTHETIC, assert_same_bits, guarded, random_packed

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES, BitFormat
from amq.kernels import cpu as native
from amq.packing import PackedWeight, dequantize, pack_codes
from amq.rotation import ROTATIONS, WIDTH, divides

CSRC = Path(__file__).resolve().parent.parent / "csrc"
IN_FEATURES = (1, 7, 8, 31, 32, 33, 64, 100, 129, 576, 1536)
ISAS = native.cpu_module().isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", GROUP_SIZES, ids="g{}".format)
@pytest.mark.parametrize("name", FORMATS)
def test_bit_equal_to_reference(name: str, group_size: int, isa: str) -> None:
    for in_features in IN_FEATURES:
        for rotation in ROTATIONS if divides(in_features) else (0,):
            packed = replace(random_packed(FORMATS[name], 5, in_features, group_size), rotation=rotation)
            out = torch.full((5, in_features), torch.nan)
            native._dequantize_rows(packed, out, isa)
            assert_same_bits(out, dequantize(packed))


@pytest.mark.parametrize("name", FORMATS)
def test_every_thread_count_gives_the_same_bits(name: str) -> None:
    packed = random_packed(FORMATS[name], 301, 577, 64)  # enough weights to be split
    expected, threads = dequantize(packed), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = torch.full((301, 577), torch.nan)
            native.dequantize_into(packed, out)
            assert_same_bits(out, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FORMATS)
def test_every_fp16_scale_and_zero_point(name: str) -> None:
    """All 65,536 fp16 bit patterns; NaN results must be NaN, everything else bit-equal."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    fmt, one = FORMATS[name], torch.ones_like(halves)
    qweight = pack_codes(torch.full((len(halves), 3), fmt.max_code, dtype=torch.uint8), fmt)
    for scale, zero_point in ((halves, one), (one, halves)):
        packed = PackedWeight(fmt, 3, 32, qweight, scale, zero_point)
        out, expected = torch.zeros(len(halves), 3), dequantize(packed)
        native.dequantize_into(packed, out)
        assert torch.equal(out.isnan(), expected.isnan())
        assert_same_bits(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("in_features", (7, 129, 576))
@pytest.mark.parametrize("name", FORMATS)
def test_offset_buffers_and_guard_bytes(name: str, in_features: int) -> None:
    packed = random_packed(FORMATS[name], 3, in_features, 32)
    offsets = ((packed.qweight, 3), (packed.scale, 2), (packed.zero_point, 6))
    inputs = [guarded(tensor, before=before) for tensor, before in offsets]
    out, out_buffer = guarded(torch.full((3, in_features), torch.nan), before=4)
    shifted = PackedWeight(packed.format, in_features, 32, *(view for view, _ in inputs))
    snapshots = [buffer.clone() for _, buffer in inputs]
    native.dequantize_into(shifted, out)
    assert_same_bits(out, dequantize(packed))
    assert (out_buffer[:4] == GUARD).all() and (out_buffer[-64:] == GUARD).all()
    for (_, buffer), snapshot in zip(inputs, snapshots, strict=True):
        assert torch.equal(buffer, snapshot)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_never_reads_past_the_last_byte(name: str, isa: str) -> None:
    """qweight ends where a page without access begins: one byte too far is a crash, not a wrong number."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    forbidden = ctypes.c_void_p(start + mmap.PAGESIZE)
    assert libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    try:
        for in_features in (*range(1, 70), 576):
            packed = random_packed(FORMATS[name], 2, in_features, 32)
            data = packed.qweight.numpy().tobytes()
            address = start + mmap.PAGESIZE - len(data)
            ctypes.memmove(address, data, len(data))
            edge = torch.frombuffer(pages, dtype=torch.uint8, count=len(data), offset=mmap.PAGESIZE - len(data))
            assert edge.data_ptr() == address
            out = torch.full((2, in_features), torch.nan)
            at_edge = PackedWeight(packed.format, in_features, 32, edge.view(2, -1), packed.scale, packed.zero_point)
            native._dequantize_rows(at_edge, out, isa)
            assert_same_bits(out, dequantize(packed))
    finally:
        libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)


def test_rows_view_and_no_rows() -> None:
    packed = random_packed(FORMATS["int3"], 6, 100, 64)
    out = torch.full((6, 100), torch.nan)
    native.dequantize_into(packed.rows(2, 5), out[2:5])
    assert_same_bits(out[2:5], dequantize(packed)[2:5])
    assert out[:2].isnan().all() and out[5:].isnan().all()
    native.dequantize_into(packed.rows(0, 0), out[:0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_dtypes_take_the_reference_route(dtype: torch.dtype) -> None:
    packed = random_packed(FORMATS["int4"], 4, 100, 64)
    out = torch.empty(4, 100, dtype=dtype)
    native.dequantize_into(packed, out)
    assert torch.equal(out, dequantize(packed).to(dtype))


def test_errors_name_what_was_expected() -> None:
    packed = random_packed(FORMATS["int3"], 4, 64, 32)
    with pytest.raises(AmqError, match=r"int3: out must be \[4, 64\], got \[64, 4\]"):
        native.dequantize_into(packed, torch.empty(64, 4))
    with pytest.raises(AmqError, match=r"out must be contiguous, got strides \[1, 4\]"):
        native.dequantize_into(packed, torch.empty(64, 4).T)
    strided = PackedWeight(packed.format, 64, 32, packed.qweight, packed.scale.T.contiguous().T, packed.zero_point)
    with pytest.raises(AmqError, match="scale must be contiguous"):
        native.dequantize_into(strided, torch.empty(4, 64))
    on_meta = PackedWeight(packed.format, 64, 32, packed.qweight.to("meta"), packed.scale, packed.zero_point)
    with pytest.raises(AmqError, match="qweight must be on cpu, got meta"):
        native.dequantize_into(on_meta, torch.empty(4, 64))
    with pytest.raises(AmqError, match="format ternary .* is not compiled into amq._cpu.*pip install -e"):
        native.dequantize_into(random_packed(SYNTHETIC[0], 4, 64, 32), torch.empty(4, 64))
    namesake = BitFormat("int3", levels=7, unit_codes=8, unit_bytes=3)  # as if the build were older than formats.py
    with pytest.raises(AmqError, match="format int3 with 7 levels, .* is not compiled"):
        native.dequantize_into(random_packed(namesake, 4, 64, 32), torch.empty(4, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"format": "int99"}, "format: expected one .*int2.*got 'int99'"),
        ({"isa": "sse9"}, "isa: expected one of isas.*got 'sse9'"),
        ({"rows": -1}, "rows: expected at least 0, got -1"),
        ({"in_features": 0}, "in_features: expected at least 1, got 0"),
        ({"group_size": 12}, "group_size: expected a positive multiple of 8, got 12"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"qweight_stride": 23}, "qweight_stride: expected at least 24, got 23"),
        ({"group_stride": 1}, "group_stride: expected at least 2, got 1"),
        ({"out_stride": 63}, "out_stride: expected at least 64, got 63"),
        ({"zero_point": (0, 16)}, "zero_point: expected an address"),
        ({"rows": 1 << 31}, "rows: expected at most 2147483647, got 2147483648"),
        ({"qweight": (1, 47)}, "qweight: expected at least 48 bytes, got 47"),
        ({"scale": (1, 7)}, "scale: expected at least 8 bytes, got 7"),
        ({"zero_point": (1, 7)}, "zero_point: expected at least 8 bytes, got 7"),
        ({"out": (1, 511)}, "out: expected at least 512 bytes, got 511"),
        ({"out_stride": 1 << 62}, "out: its size does not fit 64 bits"),
    ),
)
def test_module_checks_its_arguments(change: dict, message: str) -> None:
    """With addresses that would crash if they were used."""
    addresses = dict(qweight=(1, 48), scale=(1, 8), zero_point=(1, 8), out=(1, 512))
    strides = dict(qweight_stride=24, group_stride=2, out_stride=64)
    arguments = dict(format="int3", rows=2, in_features=64, group_size=32, threads=1) | addresses | strides
    with pytest.raises(ValueError, match=message):
        native.cpu_module().dequantize(**(arguments | change))


def test_formats_and_isa_of_the_module() -> None:
    module = native.cpu_module()
    assert module.formats() == {f.name: [f.levels, f.unit_codes, f.unit_bytes] for f in FORMATS.values()}
    assert module.isas()[0] == "portable" and module.isa() == module.isas()[-1]


SHIM = """
#include "cpu/dequantize.h"
extern "C" void shim(int format, bool avx2_loops, const uint8_t* qweight, const uint16_t* scale,
                     const uint16_t* zero_point, float* out, int64_t row_bytes, int64_t groups, int64_t rows,
                     int64_t columns, int64_t group_size, bool rotated) {
    const amq::Isa isa{"", nullptr, nullptr, nullptr, nullptr, avx2_loops};
    amq::dequantize(amq::compiled_formats()[format], isa,
                    {qweight, scale, zero_point, out, row_bytes, groups, columns, rows, columns, group_size, rotated},
                    2);
}
"""


@pytest.fixture(scope="module")
def synthetic_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cpu compiled for the synthetic formats, trapping on undefined behaviour."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("synthetic")
    entries = " ".join(f"X({f.name}, {f.levels}, {f.unit_codes}, {f.unit_bytes})" for f in SYNTHETIC)
    (folder / "amq_formats.h").write_text(f"#define AMQ_FORMATS(X) {entries}\n")
    (folder / "shim.cpp").write_text(SHIM)
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -ffp-contract=off -fPIC -shared -pthread".split()
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", f"-I{folder}", f"-I{CSRC}"]
    names = ("dequantize", "threads")
    sources = [str(folder / "shim.cpp"), *(str(CSRC / "cpu" / f"{name}.cpp") for name in names)]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "shim.so")], check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SYNTHETIC, ids=lambda f: f.name)
def test_formats_nobody_has_declared_yet(synthetic_library: ctypes.CDLL, fmt: BitFormat) -> None:
    for group_size in GROUP_SIZES:
        for in_features in IN_FEATURES:
            packed = random_packed(fmt, 3, in_features, group_size)
            packed = replace(packed, rotation=WIDTH if divides(in_features) else 0)
            for avx2_loops in {False, "avx2" in ISAS}:
                out = torch.full((3, in_features), torch.nan)
                tensors = (packed.qweight, packed.scale, packed.zero_point, out)
                sizes = (packed.qweight.shape[1], packed.scale.shape[1], 3, in_features, group_size)
                synthetic_library.shim(
                    SYNTHETIC.index(fmt),
                    avx2_loops,
                    *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
                    *(ctypes.c_int64(size) for size in sizes),
                    packed.rotation > 0,
                )
                assert_same_bits(out, dequantize(packed))
