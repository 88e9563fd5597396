"""Sums of xᵀx and Cholesky factors on the CPU, by csrc/cpu/symmetric.h: half the products, one result on any threads.

Only the upper triangle of a matrix is read or made; what stands below is left as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.util.native import cpu_module, memory


def add_gram(gram: Tensor, x: Tensor, isa: str = "") -> None:
    """gram [features, features] += xᵀx on and above its diagonal; x: [tokens, features].

    Both float32, contiguous, on CPU. isa: one of `cpu_module().isas()`; the empty string means AMQ_CPU_ISA or the best.
    So for `cholesky`.
    """
    tokens, features = x.shape
    for name, tensor in (("x", x), ("gram", gram)):
        _check(name, tensor)
    if gram.shape != (features, features):
        raise AmqError(
            f"add_gram: gram must be {[features, features]} for x of {features} features, got {list(gram.shape)}"
        )
    cpu_module().add_gram(
        x=memory(x), tokens=tokens, features=features, gram=memory(gram), threads=torch.get_num_threads(), isa=isa
    )


def cholesky(matrix: Tensor, isa: str = "") -> bool:
    """Overwrites the upper triangle of `matrix` [n, n] with R, matrix = Rᵀ R; False where it is not positive definite.

    float32, contiguous, on CPU. Where the answer is False, `matrix` holds nothing of use.
    """
    _check("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise AmqError(f"cholesky: the matrix must be square, got {list(matrix.shape)}")
    threads = torch.get_num_threads()
    return bool(cpu_module().cholesky(matrix=memory(matrix), size=len(matrix), threads=threads, isa=isa))


def mirror(matrix: Tensor) -> None:
    """Copies what stands above the diagonal of `matrix` [n, n] below it. float32, contiguous, on CPU."""
    _check("matrix", matrix)
    cpu_module().mirror(matrix=memory(matrix), size=len(matrix), threads=torch.get_num_threads())


def _check(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise AmqError(f"{name} must be float32, contiguous and on cpu, got {tensor.dtype} on {tensor.device}")
