"""Activations in fewer bits than any kernel of amq multiplies, simulated: what they would cost, not what they save.

The input x of every linear of the blocks is rounded as the int8 mode of the kernels rounds it
(`amq.kernels.backends.quantize_activations`): symmetrically, for each token and group of input features on the group's
own range, but to the levels of another format. torch multiplies the rounded x with the weights that the model has. With
rotation x is rotated before (`amq.rotation`) and rotated back after: y = (W Hᵀ)(H x), so that only the rounding
changes. What 64 does not divide is not rotated. Head, embeddings, attention and caches stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from amq.formats import get_format
from amq.kernels.backends import quantize_activations
from amq.model.inventory import get_linear
from amq.rotation import WIDTH, divides, rotate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Simulated:
    """activations: the format that they are rounded to. group_size: input features that share a scale."""

    activations: str
    group_size: int
    rotated: bool

    @property
    def title(self) -> str:
        return f"{self.activations} activations{', rotated' * self.rotated} (simulated)"

    def round(self, x: Tensor) -> Tensor:
        """What a linear multiplies in the place of x, [..., in_features]; computed in float32, of x's dtype."""
        turned = self.rotated and divides(x.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rotate(rows) if turned else rows
        rows = quantize_activations(rows, self.group_size, get_format(self.activations))
        return (rotate(rows) if turned else rows).view(x.shape).to(x.dtype)

    @contextmanager
    def within(self, model: nn.Module, linears: Sequence[str]) -> Iterator[None]:
        """`model` with the inputs of these linears rounded, inside; they are torch's, since a kernel reads x itself."""
        modules = [get_linear(model, name) for name in linears]
        odd = sum(not divides(module.in_features) for module in modules)
        if self.rotated and odd:
            log.warning("%s: inputs of %d of %d linears are not rotated, %d does not divide them",
                        self.title, odd, len(modules), WIDTH)  # fmt: skip
        with ExitStack() as hooks:
            for module in modules:
                handle = module.register_forward_pre_hook(lambda m, args: (self.round(args[0]), *args[1:]))
                hooks.callback(handle.remove)
            yield
