"""Doors to the GPU kernels in `kernels/`: one layout for both backends, one file per backend.

`layout` repacks a weight once; `triton` and `cuda` launch on what it made. Nothing here imports Triton or loads the
CUDA library before a kernel is asked for, so that a machine with neither imports amq as before.
"""
