"""What a `DecoderSpec` names of a checkpoint, as addresses for `amq._cpu`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amq.formats import get_format
from amq.kernels import cpu
from amq.kernels.cpu import NO_MEMORY, empty_bytes, memory, prepared_bytes
from amq.packing import PackedWeight
from amq.runtime.decoder_spec import Linear
from amq.runtime.weights import Weights

ALIGNMENT = 64
"""Of weights in memory: a cache line."""

Held = tuple[str, tuple[int, int], tuple[int, int], tuple[int, int], int]
"""(format or dtype, memory, memory of scales, of zero points, rotation): csrc/decoder_spec.h."""


class NativeWeights(Weights):
    """`Weights` for csrc/cpu.

    held: {name: Held}, for the decoder. keep: what the addresses in it belong to.

    Prepared weights lie one after another in one piece of memory, in the order in which a pass reads them: on large
    pages, which single weights of a small model would not fill. Rows of embeddings stay in the checkpoint's files.
    """

    def _begin(self) -> None:
        self.held: dict[str, Held] = {}
        self.keep: list[Any] = []
        self._memory = empty_bytes(sum(self._prepared_bytes(name) for name in self._tiled()))

    def _put_prepared(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        room = self._prepared_bytes(key)
        size = prepared_bytes(packed.format, packed.out_features, packed.in_features, packed.group_size)
        data = cpu.prepare(packed, self._memory[:size])
        self._memory = self._memory[room:]
        return self._hold(key, packed.format.name, data, rotation=packed.rotation)

    def _put_rows(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        parts = [part.contiguous() for part in (packed.qweight, packed.scale, packed.zero_point)]
        return self._hold(key, packed.format.name, *parts)

    def _put_elements(self, key: str, tensor: Tensor) -> tuple[int, int]:
        return self._hold(key, str(tensor.dtype).removeprefix("torch."), tensor)

    def _put_again(self, key: str, name: str) -> None:
        self.held[key] = self.held[name]

    def _hold(self, key: str, kind: str, data: Tensor, *more: Tensor, rotation: int = 0) -> tuple[int, int]:
        self.keep += [data, *more]
        scales, zero_points = map(memory, more) if more else (NO_MEMORY, NO_MEMORY)
        self.held[key] = (kind, memory(data), scales, zero_points, rotation)
        return memory(data)

    def _tiled(self) -> list[str]:
        """Names of what is prepared, each once."""
        names = [linear.name for linear in self.spec.parts(Linear)] + [self._source(self.spec.head.name)]
        names += [self._source(self.spec.embedding.name)] * (not self._packed_rows(self.spec.embedding))
        return [name for name in dict.fromkeys(names) if name in self.formats]

    def _prepared_bytes(self, name: str) -> int:
        record = self.checkpoint.record
        size = prepared_bytes(get_format(self.formats[name]), *record.shapes[name], record.group_size)
        return -(-size // ALIGNMENT) * ALIGNMENT
