"""A model's weights from the tensors of a GGUF file: each from one tensor or several, changed back to transformers'.

Experts lie in one parameter per layer and role, or with gate and up in one; in the file a role is a tensor of its own,
or gate and up are one. What a parameter's layout is, its module says (`amq.model.experts.views_of`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.experts import FUSED, is_fused, views_of
from amq.model.gguf.families import Family
from amq.model.gguf.file import GgufTensor
from amq.model.gguf.orders import BLOCK, Config
from amq.model.gguf.places import Place, Places

BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class _Piece:
    """The rows of a weight, or of one expert's role in it, that a tensor of the file holds.

    view: of the whole weight, the part that `place` speaks of.
    """

    place: Place
    view: Callable[[Tensor], Tensor]


class Weights:
    """Of one model and one file. shapes: of all weights, each once, in the model's order. taken: tensors that are used.

    missing: weights for which the file has no tensor. Raises AmqError for a weight that llama.cpp has no place for.
    """

    def __init__(self, model: nn.Module, family: Family, layers: int, tensors: Sequence[GgufTensor]) -> None:
        self._family, self._layers = family, layers
        self._config: Config = model.config.to_dict()  # type: ignore[operator,union-attr]
        self._places, self._tensors = Places(family, self._config, layers), {t.name: t for t in tensors}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _once(model)}
        self._pieces = {name: list(self._pieces_of(model, name)) for name in self.shapes}
        self.taken = {piece.place.name for pieces in self._pieces.values() for piece in pieces}
        self.missing = [
            n for n, pieces in self._pieces.items() if any(p.place.name not in self._tensors for p in pieces)
        ]

    def leaves(self, name: str) -> bool:
        """Whether the model does without the tensor `name`: nothing in its passes uses it, or it is of a block that
        predicts a token after the next."""
        block = BLOCK_NUMBER.match(name)
        return self._family.unused(self._config, name) or (block is not None and int(block[1]) >= self._layers)

    def _pieces_of(self, model: nn.Module, name: str) -> Iterator[_Piece]:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not is_fused(module):
            yield from (_Piece(place, lambda weight: weight) for place in self._places.of(name))
            return
        suffix = "bias" if leaf.endswith("_bias") else "weight"
        joint = f"{owner}.{FUSED}.{suffix}"
        if leaf.startswith(FUSED) and self._places.has(joint) and module.is_concatenated and not module.is_transposed:
            (place,) = self._places.of(joint)
            if place.name in self._tensors:
                yield _Piece(place, lambda weight: weight)
                return
        roles = [role for role, _ in views_of(module, leaf, torch.empty(self.shapes[name], device="meta"))]
        for index, role in enumerate(roles):
            for place in self._places.of(f"{owner}.{role}.{suffix}"):
                yield _Piece(place, _view(module, leaf, index))

    def check_shapes(self) -> None:
        """Raises AmqError unless every weight comes from tensors of its shape."""
        for name, shape in self.shapes.items():
            whole = torch.empty(shape, device="meta")
            for piece in self._pieces[name]:
                tensor, expected = self._tensors[piece.place.name], self._shape_in_file(piece, whole)
                if _without_ones(tensor.shape) != _without_ones(expected):
                    raise AmqError(
                        f"{tensor.name} {list(tensor.shape)} cannot be {name} of shape {list(shape)}, as its keys say: "
                        f"that is {list(expected)} in the file"
                    )

    def _shape_in_file(self, piece: _Piece, whole: Tensor) -> tuple[int, ...]:
        part = piece.view(whole)
        if piece.place.rows:
            part = torch.empty(len(piece.place.rows(part.shape[0])), *part.shape[1:], device="meta")
        numbers = piece.place.numbers
        return tuple((numbers.make(part, self._config) if numbers else part).shape)

    def make(self, name: str, read: Callable[[GgufTensor], np.ndarray]) -> Tensor:
        """One weight; read(tensor): its float32 numbers."""
        whole = torch.empty(self.shapes[name])
        for piece in self._pieces[name]:
            _fill(piece.view(whole), piece.place, torch.from_numpy(read(self._tensors[piece.place.name])))
        return whole


def _view(module: nn.Module, leaf: str, index: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: views_of(module, leaf, weight)[index][1]


def _fill(part: Tensor, place: Place, found: Tensor) -> None:
    """Writes the file's numbers `found` to the rows of `part` that they are of."""
    if place.blocks is not None:
        moved = torch.empty_like(found).view(len(found), len(place.blocks), BLOCK)
        moved[:, place.blocks] = found.view(moved.shape)
        found = moved.view(found.shape)
    if place.numbers is not None:
        found = place.numbers.unmake(found)
    if place.rows is None:
        part.copy_(found.reshape(part.shape))
        return
    rows = place.rows(part.shape[0])
    part[rows] = found.reshape(len(rows), *part.shape[1:])


def _once(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a shared one under its first name, and buffers that a checkpoint has."""
    yield from model.named_parameters()
    kept = cast(Mapping[str, Tensor], model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1] or [math.prod(shape)]
