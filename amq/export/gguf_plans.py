"""Which tensors a GGUF file has, and from which of the checkpoint each comes; only zero points are read for that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.common import is_expert, rows_of
from amq.export.gguf_types import REQUANTIZED, BlockType, find_type
from amq.model.gguf.families import Family
from amq.model.gguf.keys import n_layers
from amq.model.gguf.orders import BLOCK, Config
from amq.model.gguf.places import Place, Places

F32_ALWAYS = ("ffn_gate_inp", "conv1d", "shortconv.conv", ".ssm_a", ".ssm_d", ".ssm_norm")
"""Parts of the names of matrices that llama.cpp wants in 32 bits."""

TEXT_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")
HEAD, LATER = "lm_head.", "mtp."
"""How names begin: of the head, which stands beside the text model in one that also reads images; of what predicts a
token after the next."""
BLOCK_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Plan:
    """A tensor of the file.

    sources: names in the checkpoint, one, or one per expert; a linear's without `.weight`.
    shape: of the weights, in transformers' order; of several sources [experts, …].
    type: in `gguf.GGMLQuantizationType`. packed: whether the sources are packed weights.
    kind: of the codes, None where they cannot stay.
    order: int64 [rows], which row of a source comes next; None leaves them as they are.
    blocks: the same for input features, in blocks of `BLOCK`.
    make: what is done to a plain tensor; None for nothing.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: str
    packed: bool = False
    kind: BlockType | None = None
    order: Tensor | None = None
    blocks: Tensor | None = None
    make: Callable[[Tensor], Tensor] | None = None

    @property
    def source(self) -> str:
        return self.sources[0]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the text model, where a model that also reads images nests that; else the config itself."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def text_name(name: str, layers: int, nested: bool) -> str | None:
    """A tensor's name in the text model alone; None for one that is not of it, or that predicts further tokens.

    layers: of the decoder; blocks behind them are of the latter. nested: whether the text model is a part of another,
    whose encoders llama.cpp has in files of their own.
    """
    inner, found = TEXT_PART.subn("model.", name)
    if name.startswith(LATER) or (nested and not found and not name.startswith(HEAD)):
        return None
    block = BLOCK_NUMBER.match(inner)
    return None if block and int(block[1]) >= layers else inner


def make_plans(checkpoint: Checkpoint, config: Mapping[str, Any], family: Family) -> list[Plan]:
    """Every tensor of the file; config: of the text model. Raises AmqError for one that GGUF cannot hold."""
    layers = n_layers(config)
    record, places = checkpoint.record, Places(family, config, layers)
    plans, rows = [], rows_of(checkpoint)
    nested = any(TEXT_PART.match(full) for full in rows)
    for full, sources in rows.items():
        if (name := text_name(full, layers, nested)) is None:
            continue
        packed = [source in record.formats for source in sources]
        if any(packed) != all(packed):
            kept = sources[packed.index(False)]
            raise AmqError(_one_format(name, f"{kept} was kept in 16 bits, others are packed"))
        make = _packed if packed[0] else _plain
        plans += [make(checkpoint, place, sources, config) for place in places.of(name)]
    return plans


def _one_format(row: str, why: str) -> str:
    return (
        f"GGUF has one tensor, and one type, for all experts of {row.removesuffix('.weight')}; {why}: search and "
        "quantize again with `--tie experts`"
    )


def _packed(checkpoint: Checkpoint, place: Place, sources: tuple[str, ...], config: Config) -> Plan:
    record = checkpoint.record
    rows, columns = record.shapes[sources[0]]
    for source in sources:
        if (fmt := record.formats[source]) != record.formats[sources[0]]:
            row, _, _ = source.rpartition(".")
            raise AmqError(_one_format(row, f"{sources[0]} has {record.formats[sources[0]]}, {source} {fmt}"))
        if record.shapes[source] != (rows, columns):
            raise AmqError(f"GGUF cannot hold {source}: its shape is not that of {sources[0]}")
    if columns % BLOCK:
        raise AmqError(f"GGUF cannot hold {sources[0]}: its {columns} input features are not a multiple of {BLOCK}")
    if place.numbers is not None:
        raise AmqError(f"llama.cpp changes the numbers of {sources[0]}, which codes cannot take: keep it in 16 bits")
    kind = find_type([checkpoint.packed(source) for source in sources])
    order = place.rows(rows) if place.rows else None
    shape: tuple[int, ...] = (rows if order is None else len(order), columns)
    if is_expert(sources[0]):
        shape = (len(sources), *shape)
    return Plan(place.name, sources, shape, kind.name if kind else REQUANTIZED, True, kind, order, place.blocks)


def _plain(checkpoint: Checkpoint, place: Place, sources: tuple[str, ...], config: Config) -> Plan:
    tensor, numbers = checkpoint.tensor(sources[0]), place.numbers
    make = None if numbers is None else lambda tensor: numbers.make(tensor, config)
    order = place.rows(tensor.shape[0]) if place.rows else None
    tensor = tensor if order is None else tensor[order]
    made = tuple((make(tensor) if make else tensor).shape)
    exact = len(made) < 2 or any(part in place.name for part in F32_ALWAYS)
    type_ = "F32" if exact else "BF16" if tensor.dtype == torch.bfloat16 else "F16"
    shape = (len(sources), *made) if is_expert(sources[0]) else made
    return Plan(place.name, sources, shape, type_, order=order, blocks=place.blocks, make=make)
