"""What several exports need: checks that a checkpoint can be expressed, and its plain config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, get_format
from amq.kernels.cpu import dequantized
from amq.model.experts import split_expert
from amq.packing import PackedWeight
from amq.quantize.quantizers.grid import symmetric_zero
from amq.util.files import json_floats


class DenseOuter(Checkpoint):
    """`checkpoint` with its packed head and embeddings as plain tensors, of a tied pair under the embedding's name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        formats = {name: record.formats[name] for name in record.block_shapes}
        self.folder, self.config, self._packed = checkpoint.folder, checkpoint.config, checkpoint
        self.record = replace(record, formats=formats, shapes=record.block_shapes, head="", embedding={})
        self.dtype = checkpoint.tensor(checkpoint.other_names[0]).dtype
        self.outer = outer_weights(checkpoint)
        self._plain = {f"{stored_name(checkpoint, name)}.weight": name for name in self.outer}

    @property
    def other_names(self) -> list[str]:
        return [*self._plain, *self._packed.other_names]

    def tensor(self, name: str) -> Tensor:
        if name in self._plain:
            return dequantized(self._packed.packed(self._plain[name])).to(self.dtype)
        return self._packed.tensor(name)


def outer_weights(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The packed weights outside the blocks: the head, and embeddings of their own."""
    record = checkpoint.record
    return (*([record.head] if record.head else []), *record.own_embeddings)


def stored_name(checkpoint: Checkpoint, linear: str) -> str:
    """What other tools call the module of a packed weight: of a tied head and embedding, the embedding."""
    return next((name for name, head in checkpoint.record.embedding.items() if head == linear), linear)


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


def is_expert(source: str) -> bool:
    """Whether a linear, or a tensor of a linear, is an expert's."""
    return bool(split_expert(source) or split_expert(source.rpartition(".")[0]))


def check_formats(checkpoint: Checkpoint, names: Iterable[str], target: str) -> None:
    """Refuses a checkpoint with a format that `target` does not have; `names` are those that it has."""
    for linear, fmt in checkpoint.record.formats.items():
        if fmt not in names:
            raise AmqError(
                f"{target} has no {fmt}, which {linear} uses: search and quantize again with --formats "
                f"{','.join(n for n in FORMATS if n in names)}"
            )


def check_full_groups(checkpoint: Checkpoint, target: str) -> None:
    """Refuses a checkpoint in which a row does not end with a whole group."""
    size = checkpoint.record.group_size
    for linear, (_, in_features) in checkpoint.record.shapes.items():
        if in_features % size:
            raise AmqError(
                f"{target} cannot hold {linear}: its {in_features} input features are not a multiple of the group "
                f"size {size}; quantize again with a --group-size that divides {in_features}"
            )


def whole_zero_points(linear: str, packed: PackedWeight, target: str) -> Tensor:
    """int32 [out_features, n_groups] in [0, max_code], or an error that names the linear."""
    zero_point = packed.zero_point.float()
    whole = zero_point.round()
    odd = (whole != zero_point) | (whole < 0) | (whole > packed.format.max_code)
    if bool(odd.any()):
        raise AmqError(
            f"{target} holds whole zero points from 0 to {packed.format.max_code}; {linear} has "
            f"{float(zero_point[odd][0]):g} and {int(odd.sum()) - 1} more such: quantize again with "
            "`python -m amq.quantize … --zero-points integer` (or symmetric)"
        )
    return whole.to(torch.int32)


def is_symmetric(packed: PackedWeight) -> bool:
    """Whether all zero points are the middle code."""
    return bool((packed.zero_point == symmetric_zero(packed.format)).all())


def packed_linears(checkpoint: Checkpoint) -> Iterator[tuple[str, PackedWeight]]:
    """Every quantized linear, one at a time."""
    for linear in checkpoint.record.formats:
        yield linear, checkpoint.packed(linear)


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without what only amq reads."""
    config = {k: json_floats(v) for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map")}
    auto_map = {k: v for k, v in checkpoint.config.get("auto_map", {}).items() if not v.startswith("modeling_amq.")}
    return {**config, "auto_map": auto_map} if auto_map else config


def other_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, norms and biases as they are."""
    for name in checkpoint.other_names:
        yield name, checkpoint.tensor(name)


def formats_of(checkpoint: Checkpoint) -> dict[str, BitFormat]:
    """{linear: its record}."""
    return {linear: get_format(name) for linear, name in checkpoint.record.formats.items()}
