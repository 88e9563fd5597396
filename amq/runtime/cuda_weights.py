"""What a `DecoderSpec` names of a checkpoint, on the device of a `CudaEngine`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.kernels import gpu_layout
from amq.kernels.cuda_calls import ExpertWeight, device_structs
from amq.packing import PackedWeight, PreparedWeight
from amq.runtime.decoder_spec import DecoderSpec, Linear, Mixture, Mlp
from amq.runtime.families import Unsupported
from amq.runtime.weights import Weights, expert_linears


class CudaWeights(Weights):
    """`Weights` on a device, by name. Nothing is held twice: a head that an embedding is tied to is one weight.

    prepared: in the layout of amq.kernels.gpu_layout. rows: of embeddings that nothing multiplies by, packed as the
    checkpoint has them. elements: everything else; of a linear `name.weight` under `name`.
    """

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, context: int, device: torch.device) -> None:
        self.device = device
        self.prepared: dict[str, PreparedWeight] = {}
        self.rows: dict[str, PackedWeight] = {}
        self.elements: dict[str, Tensor] = {}
        super().__init__(checkpoint, spec, context)

    def of_many_rows(self) -> list[PreparedWeight]:
        """What passes multiply more than 8 rows by: not the experts."""
        experts = {linear.name for mixture in self.spec.parts(Mixture) for linear in expert_linears(mixture)}
        return [weight for name, weight in self.prepared.items() if name not in experts]

    def _put_prepared(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        data = gpu_layout.prepare(packed.to(self.device))
        self.prepared[key] = PreparedWeight.of(packed, "cuda", data)
        return _place(data)

    def _put_rows(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        self.rows[key] = packed.to(self.device)
        return _place(self.rows[key].qweight)

    def _put_elements(self, key: str, tensor: Tensor) -> tuple[int, int]:
        tensor = tensor.to(self.device)
        # A tensor of a file is mapped, and begins where it lies there; the kernels read 16 bytes at a time.
        self.elements[key] = tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
        return _place(self.elements[key])

    def _put_again(self, key: str, name: str) -> None:
        self.prepared[key] = self.prepared[name]


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


@dataclass(frozen=True)
class ExpertTables:
    """Of one mixture: the shapes of an expert's weights as LinearWeights, and its experts' addresses on the device."""

    gate_and_up: list[dict[str, Any]]
    gate_and_up_table: Tensor
    down: list[dict[str, Any]]
    down_table: Tensor


Window = tuple[Linear, int, int]
"""Rows of a linear's weight: the first, and how many."""


def gate_and_up(op: Mlp) -> list[Window]:
    """Gate and up, or up alone (relu2), whatever linears hold them."""
    wide = op.down.in_features
    if len(op.in_.linears) == 1 and op.in_.out_features != wide:
        return [(op.in_.linears[0], begin, wide) for begin in (0, wide)]
    return [(linear, 0, linear.out_features) for linear in op.in_.linears]


def in_whole_tiles(windows: list[Window]) -> bool:
    return all(begin % gpu_layout.TILE_ROWS == 0 for _, begin, _ in windows)


def expert_tables(weights: CudaWeights, op: Mixture) -> ExpertTables:
    down = [[(expert.down.linears[0], 0, expert.down.out_features)] for expert in op.experts]
    return ExpertTables(*_table(weights, [gate_and_up(expert) for expert in op.experts]), *_table(weights, down))


def _table(weights: CudaWeights, experts: list[list[Window]]) -> tuple[list[dict[str, Any]], Tensor]:
    shapes = [{"all_rows": linear.out_features, "first_row": begin, "rows": rows} for linear, begin, rows in experts[0]]
    table = []
    for linear, begin, _ in (window for windows in experts for window in windows):
        prepared = weights.prepared[linear.name]
        bias = weights.elements[f"{linear.name}.bias"].data_ptr() + 4 * begin if linear.bias else None
        table.append(ExpertWeight(prepared.data.data_ptr(), bias, prepared.format.bits))
    return shapes, device_structs(table, weights.device)


def check_supported(spec: DecoderSpec, formats: Container[str]) -> None:
    """Raises Unsupported for what the CUDA engine lacks. formats: names of the linears that are quantized."""
    for mixture in spec.parts(Mixture):
        for linear in expert_linears(mixture):
            if linear.name not in formats:
                raise Unsupported(f"the CUDA engine wants experts quantized, {linear.name} is not")
        first = mixture.experts[0]
        if not in_whole_tiles(gate_and_up(first)):
            raise Unsupported(
                f"the CUDA engine wants experts of a width that divides by {gpu_layout.TILE_ROWS}, not "
                f"{first.down.in_features}"
            )
