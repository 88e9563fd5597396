"""Which tensors a GGUF file has, and from which of the checkpoint each comes; only zero points are read for that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.common import is_expert, rows_of
from amq.export.gguf_families import Change, Family
from amq.export.gguf_keys import Config, n_layers
from amq.export.gguf_types import BLOCK, REQUANTIZED, BlockType, find_type

F32_ALWAYS = ("ffn_gate_inp", "conv1d", "shortconv.conv", ".ssm_a", ".ssm_d", ".ssm_norm")
"""Parts of the names of matrices that llama.cpp wants in 32 bits."""


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


def make_plans(checkpoint: Checkpoint, config: Mapping[str, Any], family: Family) -> list[Plan]:
    """Every tensor of the file. Raises AmqError for one that GGUF cannot hold."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, n_layers(config))
    record = checkpoint.record
    plans = []
    for name, sources in rows_of(checkpoint).items():
        changes = [change for change in family.changes if re.search(change.name, name)]
        packed = [source in record.formats for source in sources]
        if any(packed) != all(packed):
            kept = sources[packed.index(False)]
            raise AmqError(_one_format(name, f"{kept} was kept in 16 bits, others are packed"))
        make = _packed if packed[0] else _plain
        for part in _parts(changes):
            full = _renamed(name, [*changes, part])
            target = names.get_name(full, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise AmqError(f"llama.cpp's {family.arch} has no place for {name}")
            plans.append(make(checkpoint, target, sources, _Form.of([*changes, part], config)))
    return plans


@dataclass(frozen=True)
class _Form:
    """What the changes of one tensor come to."""

    make: Callable[[Tensor], Tensor] | None
    rows: Callable[[int], Tensor] | None
    blocks: Tensor | None

    @staticmethod
    def of(changes: Sequence[Change], config: Mapping[str, Any]) -> _Form:
        make = next((change.make for change in changes if change.make), None)
        rows = next((change.rows for change in changes if change.rows), None)
        blocks = next((change.blocks for change in changes if change.blocks), None)
        return _Form(
            None if make is None else lambda tensor: make(tensor, config),
            None if rows is None else lambda count: rows(config, count),
            None if blocks is None else blocks(config),
        )


def _parts(changes: Sequence[Change]) -> list[Change]:
    """A change per part of a tensor that is cut; else one that changes nothing."""
    renames = next((change.split for change in changes if change.split), ())

    def part(index: int) -> Callable[[Config, int], Tensor]:
        return lambda config, rows: torch.arange(rows).chunk(len(renames))[index]

    return [Change("", rename=rename, rows=part(i)) for i, rename in enumerate(renames)] or [Change("")]


def _renamed(name: str, changes: Sequence[Change]) -> str:
    for change in changes:
        what, by = change.rename
        name = name.replace(what, by) if what else name
    return name


def _one_format(row: str, why: str) -> str:
    return (
        f"GGUF has one tensor, and one type, for all experts of {row.removesuffix('.weight')}; {why}: search and "
        "quantize again with `--tie experts`"
    )


def _packed(checkpoint: Checkpoint, name: str, sources: tuple[str, ...], form: _Form) -> Plan:
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
    if form.make is not None:
        raise AmqError(f"llama.cpp changes the numbers of {sources[0]}, which codes cannot take: keep it in 16 bits")
    kind = find_type([checkpoint.packed(source) for source in sources])
    order = form.rows(rows) if form.rows else None
    shape: tuple[int, ...] = (rows if order is None else len(order), columns)
    if is_expert(sources[0]):
        shape = (len(sources), *shape)
    return Plan(name, sources, shape, kind.name if kind else REQUANTIZED, True, kind, order, form.blocks)


def _plain(checkpoint: Checkpoint, name: str, sources: tuple[str, ...], form: _Form) -> Plan:
    tensor = checkpoint.tensor(sources[0])
    order = form.rows(tensor.shape[0]) if form.rows else None
    tensor = tensor if order is None else tensor[order]
    made = tuple((form.make(tensor) if form.make else tensor).shape)
    exact = len(made) < 2 or any(part in name for part in F32_ALWAYS)
    type_ = "F32" if exact else "BF16" if tensor.dtype == torch.bfloat16 else "F16"
    shape = (len(sources), *made) if is_expert(sources[0]) else made
    return Plan(name, sources, shape, type_, order=order, blocks=form.blocks, make=form.make)
