"""The methods that quantize one block, and the stream that calls them: model → one `BlockResult` after the other.

A calibrated method sees the inputs that the quantized blocks before it produce, measures all its linears' inputs once,
moves scales between producers and linears (`awq`), and rounds. Blocks before the current one hold their dequantized
weights, so memory is the model, one block's statistics and the hidden states of the calibration windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from amq.formats import NO_ROTATION, get_format
from amq.kernels.dense import dequantized
from amq.model.calibration import CalibrationStream, InputGroup, in_parts
from amq.model.inventory import Inventory, LinearSpec, get_linear
from amq.model.paging import holding
from amq.model.shape import ModelShape
from amq.model.token_weights import OutputMoments, token_weights
from amq.packing import PackedWeight
from amq.quantize.exponents import move_exponent, unfit
from amq.quantize.fold import Fold, apply_fold, find_fold
from amq.quantize.methods import Method
from amq.quantize.pieces import put, square_error, stacks
from amq.quantize.quantizers import QUANTIZERS
from amq.quantize.quantizers.awq import search_scale
from amq.quantize.quantizers.grid import check_scales
from amq.quantize.rotate import Rotator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SCALED = 16
"""Weights of a group that its scales are searched on, evenly spread: experts by the hundred agree."""


@dataclass
class BlockResult:
    """One finished block.

    packed: {linear: weight}. changed: {parameter name: new value} of norms and biases that took a scale.
    errors: {linear: ‖(W − Ŵ)x‖/‖Wx‖ over calibration inputs, or ‖W − Ŵ‖/‖W‖ without calibration}; W after folding.
    notes: what a user should know of, such as which scales could not be folded.
    """

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class BlockSource(Protocol):
    """Makes the blocks' results in order: `make(0)`, `finish(…)`, `make(1)`, …; one made before is only finished."""

    def make(self, block: int) -> BlockResult: ...

    def finish(self, result: BlockResult) -> None: ...


class BlockQuantizer:
    """Quantizes `model` in place, one block per call, in order.

    formats: {linear: format name}; the inventory's other linears keep their weights, but for scales that are folded
        into the producer of an input that they share.
    windows: int64 [windows, length]; methods without calibration look at the first alone, and only for odd weights.
    stored: dtype that norms will have in the checkpoint. rotation: of `ROTATIONS`, as far as the method knows them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inventory: Inventory,
        formats: Mapping[str, str],
        group_size: int,
        method: Method,
        windows: Tensor,
        zero_points: str = "fractional",
        stored: torch.dtype = torch.float32,
        rotation: str = NO_ROTATION,
    ) -> None:
        self._model, self._inventory = model, inventory
        self._formats = {name: get_format(fmt) for name, fmt in formats.items()}
        self._group_size, self._method, self._zero_points, self._stored = group_size, method, zero_points, stored
        self._windows, self._rotation = windows, rotation
        self._shape = ModelShape.of(model.config)

    @cached_property
    def _stream(self) -> CalibrationStream | None:
        """Starts with the first block: what the embedding holds then counts."""
        if not self._method.calibrated:
            return None
        weights = None
        if self._method.weighted:
            weights = token_weights(self._model, self._inventory, self._windows, outputs=self._outputs)
        return CalibrationStream(self._model, self._windows, weights=weights)

    @cached_property
    def _outputs(self) -> OutputMoments | None:
        """Filled when the stream starts."""
        return OutputMoments(self._inventory.linears) if self._method.two_sided else None

    @torch.no_grad()
    def make(self, block: int) -> BlockResult:
        """Quantizes the next block, whose number is `block`."""
        result = BlockResult()
        with holding(self._model, block):
            self._make(block, result)
        return result

    def _make(self, block: int, result: BlockResult) -> None:
        linears = self._inventory.in_block(block)
        if small_or_large := unfit(self._model, self._quantized(linears), self._formats, self._group_size):
            self._move_exponents(block, small_or_large, result)
        rotator = Rotator(
            self._rotation, QUANTIZERS[self._method.rounding], self._group_size, self._zero_points,
            outputs=self._outputs,
        )  # fmt: skip
        if self._stream is None:
            self._round(linears, None, rotator, result)
            return
        # Scales are searched on the block as it was, so all inputs are measured before the first is moved.
        for part in [linears] if self._method.scales else in_parts(self._quantized(linears)):
            groups = [group for group in self._stream.measure(part) if self._quantized(group.linears)]
            result.notes += self._stream.notes
            if self._method.scales:
                groups = self._scale(block, groups, self._stream.sample, result)
            rounded = [InputGroup(tuple(self._quantized(group.linears)), group.gram) for group in groups]
            rotator.decide(rounded, self._weight, lambda spec: [self._formats[spec.name]])
            while groups:  # a group's matrix goes when it has been used
                group = groups.pop(0)
                self._round(group.linears, group.gram, rotator, result)

    def _move_exponents(self, block: int, names: set[str], result: BlockResult) -> None:
        """Makes the linears `names` of the next block fit, or raises AmqError; rare, so it may take its time."""
        linears = self._inventory.in_block(block)
        stream = self._stream
        if stream is None:
            stream = CalibrationStream(self._model, self._windows[:1])
            for _ in range(block):
                stream.advance()
        how = (self._formats, self._group_size, self._shape.head_dim(block), stream.sample, self._stored)
        for group in stream.measure(linears):
            if any(spec.name in names for spec in group.linears):
                fold = move_exponent(self._model, f"{self._inventory.blocks_path}.{block}", group, *how)
                self._note_changes(fold, group.linears, result)
                moved = ", ".join(spec.role for spec in group.linears)
                result.notes.append(f"block {block}: {moved}: their scales lie beyond fp16, moved into {fold.producer}")
        for spec in self._quantized(linears):
            weight = get_linear(self._model, spec.name).weight
            check_scales(spec.name, weight, self._formats[spec.name], self._group_size)

    def _quantized(self, linears: Sequence[LinearSpec]) -> list[LinearSpec]:
        """Those of `linears` that are not kept as they are."""
        return [spec for spec in linears if spec.name in self._formats]

    @torch.no_grad()
    def finish(self, result: BlockResult) -> None:
        """Leaves that block's dequantized weights in the model and goes on; `result` may be of an earlier run."""
        stream = self._stream  # which weighs tokens by the model as it was
        install(self._model, result)
        if stream is not None:
            stream.advance()

    def _weight(self, spec: LinearSpec) -> Tensor:
        return get_linear(self._model, spec.name).weight.detach()

    def _round(self, specs: Sequence[LinearSpec], gram: Tensor | None, rotator: Rotator, result: BlockResult) -> None:
        """Rounds linears that share an input: those of one format together, as many as memory is set aside for."""
        by_format: dict[str, list[LinearSpec]] = {}
        for spec in self._quantized(specs):
            by_format.setdefault(self._formats[spec.name].name, []).append(spec)
        for name, stack in ((name, stack) for name, alike in by_format.items() for stack in stacks(alike)):
            weights = [self._weight(s) for s in stack]
            made = rotator.quantize(stack, weights, [get_format(name)], gram)
            for spec, weight, packed in zip(stack, weights, made, strict=True):
                result.packed[spec.name] = packed[name]
                result.errors[spec.name] = relative_error(weight, packed[name], gram)

    def _scale(
        self, block: int, groups: Sequence[InputGroup], run: Callable[[], Tensor], result: BlockResult
    ) -> list[InputGroup]:
        """Searches every group's scales and moves them into their producers; returns the groups as they are then.

        All scales are searched on the weights as they were: a producer's rows get a factor each, which leaves the
        relative error of rounding them alone.
        """
        scaled, path, head_dim = [], f"{self._inventory.blocks_path}.{block}", self._shape.head_dim(block)
        for group in groups:
            fold = find_fold(self._model, path, group.linears, head_dim, run)
            if fold is None:
                note = f"{group.linears[0].role}: nothing in the block can take its scales"
                result.notes += [note] if note not in result.notes else []
                scaled.append(group)
                continue
            rounded = self._quantized(group.linears)
            rounded = rounded[:: max(1, len(rounded) // SCALED)]
            weights = [self._weight(s) for s in rounded]
            formats = [self._formats[s.name] for s in rounded]
            scale, _ = search_scale(weights, formats, self._group_size, group.gram, self._zero_points, fold.index)
            index = fold.index.to(scale.device)
            factors = torch.ones(int(index.max()) + 1, device=scale.device)
            factors[index] = 1 / scale
            factors = apply_fold(self._model, fold, group.linears, factors, self._stored)
            scale = 1 / factors.to(scale.device)[index]
            scaled.append(InputGroup(group.linears, group.gram / scale.unsqueeze(1) / scale))
            self._note_changes(fold, group.linears, result)
        return scaled

    def _note_changes(self, fold: Fold, readers: Sequence[LinearSpec], result: BlockResult) -> None:
        """Keeps the changed parameters that stay in the checkpoint as they are: norms, biases, and kept linears."""
        module = self._model.get_submodule(fold.producer)
        for name, parameter in module.named_parameters(recurse=False):
            if fold.producer not in self._formats or name != "weight":
                result.changed[f"{fold.producer}.{name}"] = parameter.data.clone()
        for spec in (s for s in readers if s.name not in self._formats):
            result.changed[f"{spec.name}.weight"] = get_linear(self._model, spec.name).weight.data.clone()


def install(model: nn.Module, result: BlockResult) -> None:
    """Puts a block's dequantized weights and changed parameters into `model`, which holds that block."""
    for name, value in result.changed.items():
        model.get_parameter(name).data.copy_(value)
    for name, packed in result.packed.items():
        put(get_linear(model, name).weight.data, packed)


def relative_error(weight: Tensor, packed: PackedWeight, gram: Tensor | None) -> float:
    """‖(W − Ŵ)x‖/‖Wx‖, root mean square over tokens and rows; without `gram` ‖W − Ŵ‖/‖W‖."""
    if gram is None:
        return math.sqrt(square_error(weight, packed) / max(square_error(weight, None), 1e-30))

    def energy(rows: Tensor) -> float:
        return float((rows @ gram).mul_(rows).sum(dtype=torch.float64))

    weight = weight.float()
    return math.sqrt(max(energy(dequantized(packed.to(weight.device)).sub_(weight)), 0.0) / max(energy(weight), 1e-30))
