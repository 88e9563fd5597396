"""auto-round-lib, the kernels of Intel's AutoRound (what `QuantLinear.forward` calls): symmetric, float32 scales.

Compute type `int8`, which is at least as fast as its default `auto`. Its thread pool is sized from OMP_NUM_THREADS when
the module is loaded, and its threads wait for each other by spinning: beside another busy process, two threads on two
cores took 10 ms per product (measured 2026-11) instead of a fraction of one.
"""

from __future__ import annotations

import numpy as np

from .base import GROUP_SIZE, Peer, Product, Runner, missing_module, random_scales


class AutoRound(Peer):
    def __init__(self, rival: str, bits: int) -> None:
        self.name, self.rival, self.bits = f"auto-round-int{bits}", rival, bits

    def unsupported_reason(self) -> str | None:
        return missing_module("torch", "auto_round_kernel")

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        groups = in_features // GROUP_SIZE
        return out_features * (in_features * self.bits // 8 + 8 * groups)  # a scale and a sum per group, measured

    def build(self, problem: Product, x: np.ndarray) -> Runner:
        return _Blobs(problem, x, self.bits)


class _Blobs(Runner):
    def __init__(self, problem: Product, x: np.ndarray, bits: int) -> None:
        import auto_round_kernel
        import torch

        torch.set_num_threads(problem.threads)
        self._multiply, self._x, self._bias = auto_round_kernel.woqgemm, torch.from_numpy(x), torch.empty(0)
        n, k, random = problem.out_features, problem.in_features, problem.random()
        self._fields = (n, k, GROUP_SIZE, "int8", f"int{bits}", "fp32", False)
        self._blobs, low = [], -(2 ** (bits - 1))
        for index in range(problem.count):
            codes = (np.frombuffer(random.bytes(k * n), np.int8) & np.int8(2**bits - 1)).reshape(k, n) + np.int8(low)
            scales = random_scales(random, k // GROUP_SIZE, n)
            if index == 0:
                self.reference = np.ascontiguousarray((codes * scales.repeat(GROUP_SIZE, 0)).T)
            blob = auto_round_kernel.repack_quantized_weight(
                torch.from_numpy(codes), torch.from_numpy(scales), torch.empty(0, dtype=torch.int8), *self._fields[2:]
            )
            self._blobs.append(blob)
        self._out = [torch.empty(problem.tokens, n) for _ in self._blobs]

    def run(self) -> None:
        for blob, out in zip(self._blobs, self._out, strict=True):
            self._multiply(self._x, blob, self._bias, *self._fields, out)

    def first(self) -> np.ndarray:
        return self._out[0].numpy()
