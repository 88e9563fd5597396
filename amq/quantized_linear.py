"""QuantizedLinear: an `nn.Linear` whose weight stays in its bit format and is multiplied by a backend's kernel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from amq.backends import prepare
from amq.ops import linear
from amq.packing import PackedWeight, PreparedWeight


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ (+ bias), float32, bfloat16 or float16 in and out, [..., in_features] → [..., out_features].

    weight: prepared; its bytes are a buffer of the module, and not in its state dict, because the layout is the
        backend's: a checkpoint stores the packed weight.
    bias: [out_features] or None.
    activations: `int8` or `fp32`; see `amq.ops.linear`.
    name: the linear's dotted name in its model, for errors.
    """

    def __init__(
        self, weight: PreparedWeight, bias: Tensor | None = None, activations: str = "int8", name: str = "linear"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.activations, self.name = activations, name
        self._weight = weight
        self.register_buffer("data", weight.data, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        backend: str = "cpu",
        activations: str = "int8",
        name: str = "linear",
    ) -> QuantizedLinear:
        """Prepares `packed` for `backend`; drop `packed` afterwards to hold the weight only once."""
        return cls(prepare(packed, backend), bias, activations, name)

    @property
    def weight(self) -> PreparedWeight:
        if self.data is not self._weight.data:  # torch moved or replaced the buffer
            self._weight = replace(self._weight, data=self.data)
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, (self.weight,), self.bias, self.activations, self.name)

    def extra_repr(self) -> str:
        weight = self._weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={weight.format.name}, group_size={weight.group_size}, backend={weight.backend}, "
            f"activations={self.activations}"
        )
