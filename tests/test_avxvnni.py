"""AVX-VNNI on processors without it: what its kernels multiply with, the one instruction done by plain loops.

All else of `linear_avxvnni.cpp` is what AVX2 runs. Where the processor has the instruction, every test of the linears
runs it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from amq.formats import FORMATS
from amq.kernels.cpu import cpu_module

CSRC = Path(__file__).resolve().parents[1] / "csrc"
BITS = sorted({fmt.bits for fmt in FORMATS.values()})
SOURCE = r"""
#include <immintrin.h>

// sum + Σ of four products of a byte without and a byte with a sign, lane by lane, as Intel's manual says of VPDPBUSD.
static inline __m256i emulated(__m256i sum, __m256i codes, __m256i values) {
    alignas(32) int lanes[8];
    alignas(32) unsigned char a[32];
    alignas(32) signed char b[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    _mm256_store_si256(reinterpret_cast<__m256i*>(a), codes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(b), values);
    for (int i = 0; i < 32; ++i) lanes[i / 4] += a[i] * b[i];
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
}
#undef __AVXVNNI__
#define __AVXVNNI__ 1
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated

#include "cpu/simd_avx2.h"

template <int bits>
static void dot(const int* sum, const uint8_t* codes, const uint8_t* x, int* out) {
    using S = amq::Avx2<true>;
    S::store_int(out, S::dot<bits>(S::load(sum), S::load(codes), x));
}

extern "C" void shim(int bits, const int* sum, const uint8_t* codes, const uint8_t* x, int* out) {
    switch (bits) {
CASES
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    if "avx2" not in cpu_module().isas():
        pytest.skip("this processor runs no AVX2: there are no two to compare")
    folder = tmp_path_factory.mktemp("avxvnni")
    cases = "\n".join(f"        case {bits}: return dot<{bits}>(sum, codes, x, out);" for bits in BITS)
    (folder / "shim.cpp").write_text(SOURCE.replace("CASES", cases))
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -mavx2 -mfma -mf16c -fPIC -shared".split()
    command = [compiler, *flags, f"-I{CSRC}", str(folder / "shim.cpp"), "-o", str(folder / "shim.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_dots_are_the_sums_of_products(library: ctypes.CDLL, bits: int) -> None:
    """Extremes among them: the largest code times ±127, four times over, on sums near the ends of 24 bits."""
    random = np.random.default_rng(bits)
    for turn in range(50):
        codes = random.integers(0, 1 << bits, 64).astype(np.uint8)
        x = random.integers(-127, 128, 4).astype(np.int8)
        if turn < 2:
            codes[:], x[:] = (1 << bits) - 1, 127 * (-1) ** turn
        sums, out = random.integers(-(1 << 24), 1 << 24, 16).astype(np.int32), np.zeros(16, np.int32)
        library.shim(bits, *(ctypes.c_void_p(array.ctypes.data) for array in (sums, codes, x, out)))
        expected = sums + (codes.reshape(16, 4).astype(np.int32) * x.astype(np.int32)).sum(1)
        np.testing.assert_array_equal(out, expected)
