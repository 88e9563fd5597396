"""torch's own linears: float32 and bfloat16 as baselines, and its 4-bit weight-only product for CPUs."""

from __future__ import annotations

import numpy as np

from .base import GROUP_SIZE, Peer, Product, Runner, missing_module, random_scales


class TorchDense(Peer):
    rival = ""

    def __init__(self, dtype: str) -> None:
        self.name, self.dtype = f"torch-{dtype}", dtype

    def unsupported_reason(self) -> str | None:
        return missing_module("torch")

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        return out_features * in_features * {"float32": 4, "bfloat16": 2}[self.dtype]

    def build(self, problem: Product, x: np.ndarray) -> Runner:
        import torch

        def weight(random: np.random.Generator) -> torch.Tensor:
            values = random.random((problem.out_features, problem.in_features), dtype=np.float32) - np.float32(0.5)
            return torch.from_numpy(values).to(getattr(torch, self.dtype))

        return _Linears(problem, x, weight, torch.nn.functional.linear, lambda w: w.float().numpy(), self.dtype)


class TorchInt4(Peer):
    """`_weight_int4pack_mm_for_cpu`: unsigned codes, (code − 8) · scale + zero, bfloat16 everywhere else."""

    name, rival = "torch-int4pack", "int4"

    def unsupported_reason(self) -> str | None:
        reason = missing_module("torch")
        if reason is None:
            import torch

            if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
                return f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"
        return reason

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        return out_features * (in_features // 2 + 4 * (in_features // GROUP_SIZE))

    def build(self, problem: Product, x: np.ndarray) -> Runner:
        import torch

        n, k, first = problem.out_features, problem.in_features, []

        def weight(random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            data = np.frombuffer(random.bytes(n * k // 2), np.uint8).reshape(n, k // 2)
            scale = torch.from_numpy(random_scales(random, k // GROUP_SIZE, n)).bfloat16()
            zero = torch.from_numpy(random_scales(random, k // GROUP_SIZE, n)).bfloat16()
            packed = torch.from_numpy(data.copy())  # whatever their order, any bytes are 4-bit codes
            if not first:
                codes = torch.from_numpy(np.stack([data & np.uint8(15), data >> np.uint8(4)], 2).reshape(n, k)).int()
                per_code = (t.float().T.repeat_interleave(GROUP_SIZE, 1) for t in (scale, zero))
                first.append((codes - 8) * next(per_code) + next(per_code))
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            return packed, torch.stack([scale, zero], dim=2).contiguous()

        def multiply(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], GROUP_SIZE, weight[1])

        return _Linears(problem, x, weight, multiply, lambda _: first[0].numpy(), "bfloat16")


class _Linears(Runner):
    """A Python loop, as an eager model is one."""

    def __init__(self, problem, x, make_weight, multiply, dequantize, dtype) -> None:
        import torch

        torch.set_num_threads(problem.threads)
        random = problem.random()
        self._weights = [make_weight(random) for _ in range(problem.count)]
        self.reference = dequantize(self._weights[0])
        self._x, self._multiply = torch.from_numpy(x).to(getattr(torch, dtype)), multiply

    def run(self) -> None:
        import torch

        with torch.inference_mode():
            self._out = [self._multiply(self._x, weight) for weight in self._weights]

    def first(self) -> np.ndarray:
        return self._out[0].float().numpy()
