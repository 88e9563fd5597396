"""4-bit codes: two to a byte; the planes are the byte words."""

import triton
import triton.language as tl

BITS = tl.constexpr(4)


@triton.jit
def byte_words(planes):
    return planes
