"""Triton kernels on prepared weights (`amq/kernels/gpu_layout.py`), for `amq/kernels/triton.py`, installed as
`amq._triton`.

`gemv` and `gemm` are one body each for all formats, `dequantize` a third kernel, `slabs` what they share. A format is a
file with `BITS` and `byte_words(planes)`, which gives the byte words of its planes, and a line in DECODERS.
"""

from . import int2, int3, int4, int5, int6, int8

DECODERS = {
    name: (module.BITS.value, module.byte_words, int(getattr(module.byte_words, "cache_key", "0")[:7], 16))
    for name, module in (
        ("int2", int2),
        ("int3", int3),
        ("int4", int4),
        ("int5", int5),
        ("int6", int6),
        ("int8", int8),
    )
}
"""Format name → what the kernels take as a format: bits, byte_words, and a hash of its source.

Triton names a function inside a tuple by its name alone in the keys of its disk cache; the hash keeps edits apart.
"""
