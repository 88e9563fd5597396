"""What a `DecoderSpec` names of a checkpoint, as addresses for native code, and a reference to each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.formats import get_format
from amq.kernels import cpu
from amq.kernels.cpu import NO_MEMORY, empty_bytes, memory, prepared_bytes
from amq.packing import PreparedWeight
from amq.runtime.decoder_spec import Array, Attention, DecoderSpec, Linear, Mixture, Router, Table
from amq.runtime.families import Unsupported

ALIGNMENT = 64
"""Of weights in memory: a cache line."""
FLOATS = ("F32", "F16", "BF16")
"""What tensors that are not packed may be, as safetensors spells it."""

Held = tuple[str, tuple[int, int], tuple[int, int], tuple[int, int]]
"""(format or dtype, memory, memory of scales, of zero points): csrc/decoder_spec.h."""


class Weights:
    """Everything that `spec` names, read from a checkpoint.

    held: {name: Held}, for the decoder. keep: what the addresses in it belong to.
    tables: of rotary angles, which are made here for `context` positions. bytes: that a decoded token reads.

    Prepared weights lie one after another in one piece of memory, in the order in which a pass reads them: on large
    pages, which single weights of a small model would not fill. Rows of embeddings stay in the checkpoint's files.

    Raises Unsupported where the checkpoint holds something that the spec has no place for outside of the blocks,
    AmqError where it lacks something, or has it in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, context: int) -> None:
        self.checkpoint, self.spec, self.formats = checkpoint, spec, checkpoint.record.formats
        self.held: dict[str, Held] = {}
        self.keep: list[Any] = []
        self.tables: list[Tensor] = []
        self._names = set(checkpoint.other_names)
        self._used: set[str] = set()
        self._check_complete()
        self._memory = empty_bytes(sum(self._prepared_bytes(name) for name in self._tiled()))
        for linear in spec.parts(Linear):
            self._linear(linear)
        for table in (
            spec.head,
            spec.embedding,
            *(t for t in spec.parts(Table) if t not in (spec.head, spec.embedding)),
        ):
            self._table(table)
        for array in spec.parts(Array):
            self._array(array)
        self._angles(context)
        self.bytes = self._bytes_per_token()

    def _check_complete(self) -> None:
        """Compares names before anything is read. What the spec has no place for means that the model is another one
        than it seems."""
        spec = self.spec
        routers = {router.weight.name for router in spec.parts(Router)}
        for linear in spec.parts(Linear):
            quantized = linear.name in self.formats
            if quantized and linear.name in routers:
                raise Unsupported(
                    f"the native engine wants routers unquantized, {linear.name} is in {self.formats[linear.name]}"
                )
            if not quantized and f"{linear.name}.weight" not in self._names:
                raise self._edited(f"lacks the linear {linear.name}")
            self._want([f"{linear.name}.weight"] * (not quantized) + [f"{linear.name}.bias"] * linear.bias)
        self._want([array.name for array in spec.parts(Array) if array.name])
        tables = {self._source(table.name) for table in spec.parts(Table)}
        self._used |= {f"{name}.weight" for name in tables}
        linears = {linear.name for linear in spec.parts(Linear)} | tables
        for what, strange in (("linear", set(self.formats) - linears), ("tensor", self._names - self._used)):
            for name in sorted(strange):
                if name.startswith(spec.unread):
                    continue
                if ".layers." in name:
                    raise self._edited(f"holds the {what} {name}, which the model of config.json has no place for")
                raise Unsupported(f"the native engine has no place for the {what} {name}")

    def _want(self, tensors: Sequence[str]) -> None:
        for tensor in tensors:
            if tensor not in self._names:
                raise self._edited(f"lacks the tensor {tensor}")
        self._used.update(tensors)

    def _edited(self, what: str) -> AmqError:
        return AmqError(f"{self.checkpoint.folder} {what}: it is damaged, or config.json was edited")

    def _source(self, table: str) -> str:
        """The linear or embedding that holds the rows of a table."""
        return self.checkpoint.record.embedding.get(table, table)

    def _tiled(self) -> list[str]:
        """Names of what is prepared, each once."""
        names = [linear.name for linear in self.spec.parts(Linear)] + [self._source(self.spec.head.name)]
        names += [self._source(self.spec.embedding.name)] * (not self._packed_rows(self.spec.embedding))
        return [name for name in dict.fromkeys(names) if name in self.formats]

    def _packed_rows(self, table: Table) -> bool:
        """Whether rows are read from the checkpoint's own bytes: where nothing multiplies by them."""
        source = self._source(table.name)
        return source in self.formats and source != self._source(self.spec.head.name)

    def _prepared_bytes(self, name: str) -> int:
        record = self.checkpoint.record
        size = prepared_bytes(get_format(self.formats[name]), *record.shapes[name], record.group_size)
        return -(-size // ALIGNMENT) * ALIGNMENT

    def _linear(self, linear: Linear) -> None:
        shape = (linear.out_features, linear.in_features)
        if linear.name in self.formats:
            self._prepare(linear.name, linear.name, shape)
        else:
            self._elements(linear.name, self._tensor(f"{linear.name}.weight", shape))
        if linear.bias:
            self._elements(f"{linear.name}.bias", self._tensor(f"{linear.name}.bias", shape[:1]).float())

    def _check_shape(self, name: str, shape: tuple[int, int]) -> None:
        if (found := self.checkpoint.record.shapes[name]) != shape:
            raise self._edited(f"has {name} as {list(found)}, expected {list(shape)}")

    def _prepare(self, key: str, name: str, shape: tuple[int, int]) -> None:
        """Puts the packed weight `name` into tiles, unless it is there already: a head that an embedding is tied to."""
        if name not in self.held:
            self._check_shape(name, shape)
            packed, room = self.checkpoint.packed(name), self._prepared_bytes(name)
            size = prepared_bytes(packed.format, *shape, self.checkpoint.record.group_size)
            weight = PreparedWeight.of(packed, "cpu", cpu.prepare(packed, self._memory[:size]))
            self._memory = self._memory[room:]
            self.keep.append(weight.data)
            self.held[name] = (weight.format.name, memory(weight.data), NO_MEMORY, NO_MEMORY)
        self.held[key] = self.held[name]

    def _table(self, table: Table) -> None:
        source, shape = self._source(table.name), (table.rows, table.columns)
        if source not in self.formats:
            if f"{source}.weight" not in self._names:
                raise self._edited(f"lacks the tensor {source}.weight")
            self._elements(table.name, self._tensor(f"{source}.weight", shape))
        elif not self._packed_rows(table):
            self._prepare(table.name, source, shape)
        else:
            self._check_shape(source, shape)
            packed = self.checkpoint.packed(source)
            parts = [part.contiguous() for part in (packed.qweight, packed.scale, packed.zero_point)]
            self.keep += parts
            codes, scales, zero_points = map(memory, parts)
            self.held[table.name] = (packed.format.name, codes, scales, zero_points)

    def _tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of the model's shape and a dtype of floats, both compared before it is read."""
        dtype, found = self.checkpoint.described(name)
        if dtype not in FLOATS or list(found) != list(shape):
            expected = f"{' or '.join(FLOATS)} {list(shape)}"
            raise self._edited(f"has {name} as {dtype} {list(found)}, expected {expected}")
        return self.checkpoint.tensor(name)

    def _elements(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        self.keep.append(tensor)
        self.held[key] = (str(tensor.dtype).removeprefix("torch."), memory(tensor), NO_MEMORY, NO_MEMORY)

    def _array(self, array: Array) -> None:
        if array.key not in self.held:
            given = self._tensor(array.name, array.shape).float() if array.name else torch.empty(0)
            self._elements(array.key, array.make(given).float())

    def _angles(self, context: int) -> None:
        positions = torch.arange(context).float()
        for index, rope in enumerate(self.spec.ropes):
            kinds = [("", rope.frequencies, rope.factor)]
            if rope.long_frequencies is not None:
                kinds.append((".long", rope.long_frequencies, rope.long_factor))
            for which, frequencies, factor in kinds:
                angles = torch.outer(positions, frequencies)
                for name, of in (("cos", torch.cos), ("sin", torch.sin)):
                    self._made(f"rope.{index}{which}.{name}", of(angles) * factor)
        scales: set[Callable[[Tensor], Tensor]] = {
            op.position_scale for op in self.spec.parts(Attention) if op.position_scale is not None
        }
        if len(scales) > 1:
            raise Unsupported("the native engine scales the queries of all layers alike")
        for scale in scales:
            self._made("position_scale", scale(positions))

    def _made(self, key: str, table: Tensor) -> None:
        self._elements(key, table)
        self.tables.append(self.keep[-1])

    def _bytes_per_token(self) -> int:
        """Of the weights that one decoded token reads: of experts as many as it is routed to, of embeddings a row."""
        looked_up = {self.held[t.name][1][0] for t in self.spec.parts(Table)} - {self.held[self.spec.head.name][1][0]}
        sizes = {self.held[t.name][1]: 1.0 for t in (self.spec.head,)}
        for linear in self.spec.parts(Linear):
            sizes[self.held[linear.name][1]] = 1.0
            if linear.bias:
                sizes[self.held[f"{linear.name}.bias"][1]] = 1.0
        for array in self.spec.parts(Array):
            sizes[self.held[array.key][1]] = 1.0
        for mixture in self.spec.parts(Mixture):
            share = mixture.router.top_k / len(mixture.experts)
            for linear in (linear for expert in mixture.experts for linear in _linears(expert)):
                sizes[self.held[linear.name][1]] = share
        return round(sum(size * share for (address, size), share in sizes.items() if address not in looked_up))


def _linears(expert: Any) -> tuple[Linear, ...]:
    return (*expert.in_.linears, *expert.down.linears)
