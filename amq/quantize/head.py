"""`--head FORMAT`: the lm_head packed like any linear, and with it the embedding where the two are tied.

The head of a small model is a large part of what it stores and of what every token reads, and in 8 bits it loses next
to nothing. It is rounded to nearest, without calibration: each group takes the grid of least squared error. Tied
embeddings are then read from the packed head (`amq.kernels.embedding`), so that one copy is left of both. A quantizer
that sees calibration inputs sees those of the embedding as it will be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from amq.configuration import MemoryItem
from amq.errors import AmqError
from amq.formats import BitFormat, get_format
from amq.kernels.cpu import dequantized
from amq.model.inventory import get_linear
from amq.packing import PackedWeight
from amq.quantize.blocks import relative_error
from amq.quantize.quantizers.grid import out_of_range
from amq.quantize.quantizers.rtn import quantize_fitted
from amq.quantize.settings import NO_HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A head that is to be quantized.

    name: its dotted name. embedding: that of the embedding which shares its weight; empty where none does.
    """

    name: str
    embedding: str
    format: BitFormat
    shape: tuple[int, int]

    def stored_bytes(self, group_size: int) -> int:
        return self.format.stored_bytes(*self.shape, group_size)


def find_head(model: PreTrainedModel, fmt: str) -> Head | None:
    """The head of `model` for the format called `fmt`; None for `none`. Raises AmqError where there is no such head."""
    if fmt == NO_HEAD:
        return None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        found = "none" if head is None else f"a {type(head).__name__}"
        raise AmqError(f"--head {fmt}: the head must be an nn.Linear, this model has {found}; use --head {NO_HEAD}")
    names = {id(module): name for name, module in model.named_modules()}
    if not bool(torch.isfinite(head.weight).all()):
        raise AmqError(f"{names[id(head)]} holds non-finite weights: the model is damaged, load it again")
    tied = getattr(embedding, "weight", None) is head.weight
    if tied and type(embedding) is not nn.Embedding:
        raise AmqError(
            f"--head {fmt}: the embedding is tied to the head and is a {type(embedding).__name__}, which does more "
            f"than to look up rows; only an nn.Embedding can read a packed head: use --head {NO_HEAD}"
        )
    shape = (head.out_features, head.in_features)
    return Head(names[id(head)], names[id(embedding)] if tied else "", get_format(fmt), shape)


def quantize_head(model: nn.Module, head: Head, group_size: int, zero_points: str) -> tuple[PackedWeight, float]:
    """Rounds the head and leaves the result in `model`, and so in a tied embedding; with it ‖W − Ŵ‖/‖W‖."""
    parameter = get_linear(model, head.name).weight
    weight = parameter.detach().float().cpu()
    if out_of_range(weight, head.format, group_size):
        raise AmqError(
            f"{head.name}: its weights reach {float(weight.abs().max()):.1e}, for which {head.format.name} needs "
            f"scales beyond fp16's range: use --head {NO_HEAD}"
        )
    result = round_to_grid(weight, head.format, group_size, zero_points)
    error = relative_error(weight, result, None)
    parameter.data.copy_(dequantized(result))
    return result, error


def round_to_grid(weight: Tensor, fmt: BitFormat, group_size: int, zero_points: str) -> PackedWeight:
    """[rows, in_features] to nearest on the grid of least squared error, which is fitted to every group."""
    return quantize_fitted([weight], [fmt], group_size, zero_points)[0][fmt.name]


def with_head(items: tuple[MemoryItem, ...], head: Head | None, group_size: int) -> tuple[MemoryItem, ...]:
    """`amq.configuration.memory_items` with the head as it is quantized, in place of its 16 bits."""
    if head is None:
        return items
    changed = {"lm_head": MemoryItem("lm_head", head.stored_bytes(group_size), head.format.name)}
    if head.embedding:
        changed["embeddings"] = MemoryItem("embeddings", 0, "tied to the lm_head: the same bytes")
    return tuple(changed.get(item.name, item) for item in items)
