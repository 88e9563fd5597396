"""8-bit codes: one to a byte; the planes are the byte words."""

import triton
import triton.language as tl

BITS = tl.constexpr(8)


@triton.jit
def byte_words(planes):
    return planes
