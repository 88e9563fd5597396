"""Triton kernels on prepared weights (`amq/kernels/gpu_layout.py`), for `amq/kernels/triton.py`, installed as
`amq._triton`.

`gemv` and `gemm` are one body each for all formats, `dequantize` a third kernel, `slabs` what they share. To all of
them a format is the bits of its codes.
"""
