"""3-bit codes: two to a byte; the top two bits of the three planes hold the fourth byte word, 6 bits of each byte."""

import triton
import triton.language as tl

BITS = tl.constexpr(3)


@triton.jit
def byte_words(planes):
    w0, w1, w2 = planes
    w3 = (w0 >> 6) & 0x03030303 | (w1 >> 4) & 0x0C0C0C0C | (w2 >> 2) & 0x30303030
    return w0, w1, w2, w3
