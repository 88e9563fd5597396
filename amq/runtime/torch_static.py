"""A KV cache that is allocated once for several sequences, as layers of transformers' caches see it.

A layer's keys lie as [positions, rows, heads, features], a row per sequence: the first positions of the first rows are
a view, and so is each part of them that attention splits its work into (amq.runtime.torch_attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Store:
    """Keys and values of one layer, [positions + 1, rows, heads, features] each, allocated by the first that come.

    The position behind the last is written by rows that take no part in a step, and read by nobody.
    """

    def __init__(self, positions: int, rows: int) -> None:
        self.positions, self.rows = positions, rows
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def tensors(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: [sequences, heads, n, features], as a model computes them."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                torch.zeros(self.positions + 1, self.rows, t.shape[1], t.shape[3], dtype=t.dtype, device=t.device)
                for t in (keys, values)
            )
        return self.keys, self.values

    def allocated(self) -> list[Tensor]:
        """Its tensors; none for a layer that reads those of another."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def exchange(self, a: int, b: int, length: int) -> None:
        """Rows `a` and `b` change places, as far as `length` positions."""
        for tensor in self.allocated():
            held = tensor[:length, a].clone()
            tensor[:length, a] = tensor[:length, b]
            tensor[:length, b] = held


class _Layer:
    """What transformers asks of every layer while a model runs. A `CacheLayerMixin` by registration (`cache_of`): this
    module is imported without transformers."""

    is_sliding = False  # a model's mask does the sliding
    is_initialized = True
    supports_early_init = True
    is_croppable = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def get_max_length(self) -> int:
        return self._store.positions


class ReadLayer(_Layer):
    """While tokens are read into `row` behind its first `length` positions: as a cache that grows."""

    is_compileable = False

    def __init__(self, store: Store, row: int, length: int) -> None:
        super().__init__(store)
        self._row, self._length = row, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[2]
        held = self._store.tensors(key_states, value_states)
        for tensor, new in zip(held, (key_states, value_states), strict=True):
            tensor[start : self._length, self._row] = new[0].transpose(0, 1)
        keys, values = (tensor[: self._length, self._row].transpose(0, 1)[None] for tensor in held)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length


class StepLayer(_Layer):
    """For steps of one token of each of `rows`, which attend to the first `bucket` positions.

    positions, writes: int64 [rows], of the tokens, and where they are written; they are read when the step runs.
    numbers: int64 [rows], of the rows.
    """

    is_compileable = True  # lets transformers make a mask for one token, and count its positions on the device

    def __init__(
        self, store: Store, rows: slice, bucket: int, positions: Tensor, writes: Tensor, numbers: Tensor
    ) -> None:
        super().__init__(store)
        self._rows, self._bucket = rows, bucket
        self._positions, self._writes, self._numbers = positions, writes, numbers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self._store.tensors(key_states, value_states)
        for tensor, new in zip(held, (key_states, value_states), strict=True):
            tensor.index_put_((self._writes, self._numbers), new[:, :, 0])
        keys, values = (tensor[: self._bucket, self._rows].permute(1, 2, 0, 3) for tensor in held)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._bucket, 0

    def get_seq_length(self) -> Tensor:
        """Of the first row: where there are several, the model is told the positions."""
        return self._positions[0]


def cache_of(layers: Sequence[_Layer]) -> Any:
    """A cache of transformers."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(_Layer)
    found: list[Any] = list(layers)
    return Cache(layers=found)
