"""The CUDA engine on a CPU: its kernels through the shim of tests/cuda_shim, its tensors on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cuda_shim.build import chosen_build

from amq.checkpoint.store import open_checkpoint
from amq.kernels import cuda
from amq.runtime.cuda_engine import CudaEngine, open_cuda

ROUNDINGS = 16
"""Of 16-bit numbers in a layer, one behind another."""


@contextmanager
def cuda_library(folder: Path) -> Iterator[cuda.Library]:
    """`cuda.library()` is a build for a CPU."""
    before = os.environ.get("AMQ_CUDA_LIBRARY")
    os.environ["AMQ_CUDA_LIBRARY"] = str(chosen_build(folder))
    cuda.library.cache_clear()
    try:
        yield cuda.library()
    finally:
        cuda.library.cache_clear()
        del os.environ["AMQ_CUDA_LIBRARY"]
        if before is not None:
            os.environ["AMQ_CUDA_LIBRARY"] = before


def open_on_cpu(folder: Path, **options: Any) -> CudaEngine:
    return open_cuda(open_checkpoint(folder, verify=False), "cpu", **{"context": 256, "dtype": "float16", **options})


def agrees(layers: int, dtype: torch.dtype) -> float:
    """Relative difference of logits that a pass in `dtype` may have: eight times what independent roundings add up to,
    for what softmax and norms make of them."""
    return 8 * torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS * layers)
