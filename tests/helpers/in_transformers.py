"""Checkpoints as transformers loads them, and what tests compare of two such models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> nn.Module:
    """By the Auto class `kind`, in float32 unless `options` say otherwise."""
    return kind.from_pretrained(folder, **{"dtype": torch.float32, **options})


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number of `b`."""
    return float((a - b).abs().max() / b.abs().max())
