"""Weights and inputs for quantizers, and the error that these are judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amq.packing import PackedWeight, dequantize


def random_weight(rows: int, in_features: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))


def random_gram(in_features: int, tokens: int = 512, seed: int = 1) -> Tensor:
    """Correlated inputs of uneven size, as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / math.sqrt(in_features)
    x = torch.randn(tokens, in_features, generator=generator) @ (mixing + torch.eye(in_features))
    x *= torch.linspace(0.2, 3.0, in_features)[torch.randperm(in_features, generator=generator)]
    return x.T @ x / tokens


def output_error(weight: Tensor, packed: PackedWeight, gram: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each row, in float64."""
    delta = weight.double() - dequantize(packed).double()
    return ((delta @ gram.double()) * delta).sum(-1)
