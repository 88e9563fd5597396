"""What tuning may change of a quantized model: scales, zero points, norms and biases; never a code.

A weight W = (codes − zero_point)·scale has, per group, a factor e^(2θ/max_code) on its scale and a shift of its zero
point by codes: 1 of either moves the outermost weights of a group by about one code, so that the change is in
proportion to what rounding did, whatever the format. A norm or bias has a shift in units of its own root mean square.
Only these changes are held in float32: the model always has the weights that would be stored, of scales and zero points
in fp16 (norms and biases in the checkpoint's 16 bits), and gradients pass straight through the rounding. A loss that is
measured is that of the checkpoint.

No linear is replaced. While autograd runs, the dense gradient G of a weight is taken from it as soon as it is complete
and summed into those of its groups,

    ∂/∂θ = 2/max_code · Σ G·W        ∂/∂zero_point = −scale · Σ G

so that one weight's gradient exists at a time. Of a rotated weight G and W would have to be rotated first; where groups
are made of whole blocks of H this leaves the first sum as it is, since H is orthogonal, and the second is Σ G·(H·1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from amq.model.inventory import get_weight
from amq.packing import PackedWeight
from amq.quantize.pieces import put
from amq.quantize.quantizers.grid import LARGEST, to_groups
from amq.rotation import rotate

BETAS = (0.9, 0.95)
"""Of Adam; the second is short because there are tens or hundreds of steps, not thousands."""
FLOAT = 4
COPIES = 5
"""Of what is tuned, in float32: itself, its gradient, Adam's two moments, and the best that was seen."""

MATRICES = 4
"""Of the size of a weight, in float32: its gradient, as that comes and by itself, and two that are made of it."""


class _Grid:
    """Scales and zero points of one weight; `parameter` holds it dequantized."""

    def __init__(self, parameter: nn.Parameter, packed: PackedWeight, zero_points: bool) -> None:
        self.parameter, self._packed = parameter, packed.to(parameter.device)
        groups, self._unit = packed.scale.shape, 2 / packed.format.max_code
        self.values = [torch.zeros(groups, device=parameter.device) for _ in range(1 + zero_points)]
        self.gradients = [torch.zeros_like(value) for value in self.values]
        width = packed.rotation
        self._rotate = bool(width) and packed.group_size % width != 0
        ones = torch.ones(1, packed.in_features, device=parameter.device)
        self._direction = rotate(ones) if width and not self._rotate else None

    def collect(self) -> None:
        """Adds the weight's gradient to those of its groups, and lets go of it."""
        gradient, weight = self.parameter.grad, self.parameter.detach()
        self.parameter.grad = None
        assert gradient is not None
        gradient = gradient.float()
        if self._rotate:
            gradient, weight = rotate(gradient), rotate(weight)
        size = self._packed.group_size
        self.gradients[0] += to_groups(gradient * weight, size).sum(-1).mul_(self._unit)
        if len(self.values) > 1:
            if self._direction is not None:
                gradient = gradient * self._direction
            self.gradients[1] -= to_groups(gradient, size).sum(-1).mul_(self._packed.scale)

    def packed(self) -> PackedWeight:
        """The weight as it is now."""
        scale, zero_point = self._packed.scale, self._packed.zero_point
        scale = (scale * (self._unit * self.values[0]).exp()).clamp_(-LARGEST, LARGEST).half()
        if len(self.values) > 1:
            zero_point = (zero_point + self.values[1]).clamp_(-LARGEST, LARGEST).half()
        return replace(self._packed, scale=scale, zero_point=zero_point)

    def write(self) -> None:
        put(self.parameter.data, self.packed())


class _Vector:
    """One norm or bias, stored as `stored`."""

    def __init__(self, parameter: nn.Parameter, stored: torch.dtype) -> None:
        self.parameter, self._stored = parameter, stored
        self._origin = parameter.detach().clone()
        self._unit = self._origin.float().square().mean().sqrt()
        self.values = [torch.zeros_like(self._origin, dtype=torch.float32)]
        self.gradients = [torch.zeros_like(self.values[0])]

    def collect(self) -> None:
        gradient, self.parameter.grad = self.parameter.grad, None
        assert gradient is not None
        self.gradients[0] += gradient * self._unit

    def write(self) -> None:
        value = self._origin + self._unit * self.values[0]
        self.parameter.data.copy_(value.to(self._stored))


class Tunable:
    """The scales, zero points, norms and biases of `model`, which holds the dequantized weights.

    packed: {weight: as it was quantized}. vectors: names of norms and biases. stored: dtype that these will have.
    zero_points: whether zero points may change; one that is whole or the same for all must not.
    From the first on, the model holds what would be stored.
    """

    def __init__(
        self,
        model: nn.Module,
        packed: Mapping[str, PackedWeight],
        vectors: Sequence[str],
        stored: torch.dtype,
        zero_points: bool = True,
    ) -> None:
        self._grids = {n: _Grid(get_weight(model, n), weight, zero_points) for n, weight in packed.items()}
        self._all: list[_Grid | _Vector] = list(self._grids.values())
        self._all += [_Vector(model.get_parameter(name), stored) for name in vectors]
        self._values = [value for part in self._all for value in part.values]
        self._gradients = [gradient for part in self._all for gradient in part.gradients]
        for value, gradient in zip(self._values, self._gradients, strict=True):
            value.grad = gradient
        self._adam = torch.optim.Adam(self._values, betas=BETAS)
        self._write()

    @staticmethod
    def working_bytes(groups: int, vectors: int, largest: int) -> int:
        """Bytes that this takes: for so many groups, numbers in vectors, and weights of the largest matrix."""
        return COPIES * FLOAT * (2 * groups + vectors) + MATRICES * FLOAT * largest

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside, a backward pass adds to the gradients of what is tuned."""
        handles = []
        try:
            for part in self._all:
                part.parameter.requires_grad_()
                handles.append(part.parameter.register_post_accumulate_grad_hook(lambda _, part=part: part.collect()))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in self._all:
                part.parameter.requires_grad_(False).grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of Adam by the gradients that were added up since the last one."""
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        torch._foreach_zero_(self._gradients)
        self._write()

    def snapshot(self) -> list[Tensor]:
        """For `restore`."""
        return [value.clone() for value in self._values]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor]) -> None:
        for value, kept in zip(self._values, snapshot, strict=True):
            value.copy_(kept)
        self._write()

    def packed(self) -> dict[str, PackedWeight]:
        """{weight: as it is now}, on the CPU."""
        return {name: grid.packed().to("cpu") for name, grid in self._grids.items()}

    @torch.no_grad()
    def _write(self) -> None:
        for part in self._all:
            part.write()
