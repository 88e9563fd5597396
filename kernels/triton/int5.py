"""5-bit codes: one to a byte; the top three bits of the planes hold three more byte words, 15 bits of each byte."""

import triton
import triton.language as tl

BITS = tl.constexpr(5)


@triton.jit
def byte_words(planes):
    w0, w1, w2, w3, w4 = planes
    w5 = (w0 >> 5) & 0x07070707 | (w1 >> 2) & 0x18181818
    w6 = (w1 >> 7) & 0x01010101 | (w2 >> 4) & 0x0E0E0E0E | (w3 >> 1) & 0x10101010
    w7 = (w3 >> 6) & 0x03030303 | (w4 >> 3) & 0x1C1C1C1C
    return w0, w1, w2, w3, w4, w5, w6, w7
