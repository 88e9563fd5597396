"""Which tensors a GGUF file has, and from which of the checkpoint each comes; only zero points are read for that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.compact import split_expert
from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.common import stored_name
from amq.export.gguf_families import Change, Family
from amq.export.gguf_types import BLOCK, REQUANTIZED, BlockType, find_type
from amq.model.shape import kv_heads

F32_ALWAYS = ("ffn_gate_inp", "conv", "ssm_a", "ssm_d")
"""Parts of the names of matrices that llama.cpp wants in 32 bits."""


@dataclass(frozen=True)
class Plan:
    """A tensor of the file.

    sources: names in the checkpoint, one, or one per expert; a linear's without `.weight`.
    shape: of the weights, in transformers' order; of several sources [experts, …].
    type: in `gguf.GGMLQuantizationType`. packed: whether the sources are packed weights.
    kind: of the codes, None where they cannot stay.
    order: int64 [rows], which row of a source comes next; None leaves them as they are.
    make: what is done to a plain tensor; None for nothing.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: str
    packed: bool = False
    kind: BlockType | None = None
    order: Tensor | None = None
    make: Callable[[Tensor], Tensor] | None = None

    @property
    def source(self) -> str:
        return self.sources[0]


def make_plans(checkpoint: Checkpoint, config: Mapping[str, Any], family: Family) -> list[Plan]:
    """Every tensor of the file. Raises AmqError for one that GGUF cannot hold."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    record = checkpoint.record
    plans = []
    for name, sources in rows_of(checkpoint).items():
        changes = [change for change in family.changes if re.search(change.name, name)]
        full = _renamed(name, changes)
        target = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise AmqError(f"llama.cpp's {family.arch} has no place for {name}")
        packed = [source in record.formats for source in sources]
        if any(packed) != all(packed):
            kept = sources[packed.index(False)]
            raise AmqError(_one_format(name, f"{kept} was kept in 16 bits, others are packed"))
        make = next((change.make for change in changes if change.make), None)
        plan = _packed if packed[0] else _plain
        plans.append(plan(checkpoint, target, sources, make, row_order(full, config) if family.turned else None))
    return plans


def rows_of(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """{tensor name as transformers has it, experts without their number: its sources, by number}."""
    rows: dict[str, dict[int, str]] = {}
    linears = {f"{stored_name(checkpoint, linear)}.weight": linear for linear in checkpoint.record.formats}
    for full, source in (*linears.items(), *((name, name) for name in checkpoint.other_names)):
        module, _, leaf = full.rpartition(".")
        row, number = split_expert(module) or (module, 0)
        rows.setdefault(f"{row}.{leaf}" if row else leaf, {})[number] = source
    for name, sources in rows.items():
        if sorted(sources) != list(range(len(sources))):
            raise AmqError(f"{checkpoint.folder}: experts of {name} are missing: the checkpoint is incomplete")
    return {name: tuple(sources[i] for i in range(len(sources))) for name, sources in rows.items()}


def _renamed(name: str, changes: list[Change]) -> str:
    for change in changes:
        what, by = change.rename
        name = name.replace(what, by) if what else name
    return name


def _one_format(row: str, why: str) -> str:
    return (
        f"GGUF has one tensor, and one type, for all experts of {row.removesuffix('.weight')}; {why}: search and "
        "quantize again with `--tie experts`"
    )


def _packed(
    checkpoint: Checkpoint, name: str, sources: tuple[str, ...], make: object, order: Callable[[int], Tensor] | None
) -> Plan:
    record = checkpoint.record
    rows, columns = record.shapes[sources[0]]
    row = split_expert(sources[0])
    for source in sources:
        if (fmt := record.formats[source]) != record.formats[sources[0]]:
            why = f"{sources[0]} has {record.formats[sources[0]]}, {source} {fmt}"
            raise AmqError(_one_format(row[0] if row else source, why))
        if record.shapes[source] != (rows, columns):
            raise AmqError(f"GGUF cannot hold {source}: its shape is not that of {sources[0]}")
    if columns % BLOCK:
        raise AmqError(f"GGUF cannot hold {sources[0]}: its {columns} input features are not a multiple of {BLOCK}")
    if make is not None:
        raise AmqError(f"llama.cpp has {sources[0]} in another form, which packed weights cannot take: keep it in 16 bits")
    kind = find_type([checkpoint.packed(source) for source in sources])
    shape = (len(sources), rows, columns) if row else (rows, columns)
    type_ = kind.name if kind else REQUANTIZED
    return Plan(name, sources, shape, type_, True, kind, order(rows) if order else None)


def _plain(
    checkpoint: Checkpoint,
    name: str,
    sources: tuple[str, ...],
    make: Callable[[Tensor], Tensor] | None,
    order: Callable[[int], Tensor] | None,
) -> Plan:
    tensor = checkpoint.tensor(sources[0])
    rows = tensor.shape[0] if tensor.ndim else 1
    made = tuple((make(tensor) if make else tensor).shape)
    exact = len(made) < 2 or any(part in name for part in F32_ALWAYS)
    type_ = "F32" if exact else "BF16" if tensor.dtype == torch.bfloat16 else "F16"
    shape = (len(sources), *made) if split_expert(sources[0].rpartition(".")[0]) else made
    return Plan(name, sources, shape, type_, order=order(rows) if order else None, make=make)


def row_order(name: str, config: Mapping[str, Any]) -> Callable[[int], Tensor] | None:
    """For q and k: within each head, row i of the first half and row i of the second half become neighbours.

    Returns what makes int64 [rows] of a number of rows; None for other tensors.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": kv_heads(config)}.get(name.split(".")[-2])
    if not heads:
        return None
    return lambda rows: torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
