"""Rotation of input features: y = (W Hᵀ)(H x), which changes no y and makes W and x easier to round.

H is block-diagonal, `WIDTH` features wide, of the normalised Walsh–Hadamard matrix (Sylvester's order), which is
symmetric and its own inverse: what rotates W and x rotates them back. An outlier is spread over its block, inside a
quantization group or over two, so that groups are nearer to normal. The idea is QuaRot's (arXiv 2404.00456); here
it costs no stored byte and no matrix: a packed weight holds codes of W H, and x is rotated on its way into the product.

The order of additions is part of the definition: stages of width 1, 2, 4, … 32, then one product with 1/8, which is
exact. Every kernel gives the bits of `rotate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amq.errors import AmqError

WIDTH = 64
ROTATIONS = (0, WIDTH)
"""What `PackedWeight.rotation` may be: 0 for none, else the width."""
SCALE = WIDTH**-0.5


def rotate(x: Tensor) -> Tensor:
    """x · blockdiag(H), for each `WIDTH` features of the last dimension: [..., features] → the same shape and dtype.

    Computed in float32 at least. Raises AmqError where `WIDTH` does not divide the features.
    """
    check_width(x.shape[-1])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < WIDTH:
        low, high = wide.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half).unbind(-2)
        wide = torch.stack((low + high, low - high), -2)
        half *= 2
    return wide.mul_(SCALE).view(x.shape).to(x.dtype)


def divides(in_features: int) -> bool:
    """Whether inputs of so many features can be rotated."""
    return in_features % WIDTH == 0


def check_width(in_features: int, name: str = "rotation") -> None:
    """Raises AmqError where `WIDTH` does not divide `in_features`."""
    if not divides(in_features):
        raise AmqError(
            f"{name}: {in_features} input features cannot be rotated {WIDTH} at a time, because {WIDTH} does not "
            "divide them: take --rotation auto, which leaves such inputs as they are, or none"
        )
