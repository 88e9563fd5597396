"""6-bit codes: one to a byte; the top two bits of the six planes hold two more byte words, 12 bits of each byte."""

import triton
import triton.language as tl

BITS = tl.constexpr(6)


@triton.jit
def byte_words(planes):
    w0, w1, w2, w3, w4, w5 = planes
    w6 = (w0 >> 6) & 0x03030303 | (w1 >> 4) & 0x0C0C0C0C | (w2 >> 2) & 0x30303030
    w7 = (w3 >> 6) & 0x03030303 | (w4 >> 4) & 0x0C0C0C0C | (w5 >> 2) & 0x30303030
    return w0, w1, w2, w3, w4, w5, w6, w7
