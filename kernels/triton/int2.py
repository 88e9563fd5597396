"""2-bit codes: four to a byte; the planes are the byte words."""

import triton
import triton.language as tl

BITS = tl.constexpr(2)


@triton.jit
def byte_words(planes):
    return planes
