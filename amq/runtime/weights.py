"""What a `DecoderSpec` names of a checkpoint, read for an engine of our own: for `amq._cpu`, or onto a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError
from amq.packing import PackedWeight
from amq.runtime.decoder_spec import Array, Attention, DecoderSpec, Linear, Mixture, Projection, Router, Table
from amq.runtime.families import Unsupported

FLOATS = ("F32", "F16", "BF16")
"""What tensors that are not packed may be, as safetensors spells it."""


class Source(Protocol):
    """What weights are read from: an `amq.checkpoint.store.Checkpoint`, or what answers as one does."""

    folder: Path
    record: QuantizationRecord

    @property
    def other_names(self) -> list[str]: ...

    def described(self, name: str) -> tuple[str, list[int]]: ...

    def tensor(self, name: str) -> Tensor: ...

    def packed(self, linear: str) -> PackedWeight: ...


class Weights:
    """Everything that `spec` names, read from a checkpoint; where it goes, subclasses say.

    tables: of rotary angles, which are made here for `context` positions. bytes: that a decoded token reads.

    Raises Unsupported where the checkpoint holds something that the spec has no place for outside of the blocks,
    AmqError where it lacks something, or has it in another shape.
    """

    def __init__(self, checkpoint: Source, spec: DecoderSpec, context: int) -> None:
        self.checkpoint, self.spec, self.formats = checkpoint, spec, checkpoint.record.formats
        self.tables: list[Tensor] = []
        self._known: dict[str, tuple[int, int]] = {}  # by name: address and bytes
        self._names = set(checkpoint.other_names)
        self._used: set[str] = set()
        self._check_complete()
        self._begin()
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

    def _begin(self) -> None:
        """Before the first of the following."""

    def _put_prepared(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        """A weight that something multiplies by; returns the address and the bytes of what was made of it."""
        raise NotImplementedError

    def _put_rows(self, key: str, packed: PackedWeight) -> tuple[int, int]:
        """An embedding's rows as the checkpoint has them."""
        raise NotImplementedError

    def _put_elements(self, key: str, tensor: Tensor) -> tuple[int, int]:
        """A contiguous tensor that is not packed."""
        raise NotImplementedError

    def _put_again(self, key: str, name: str) -> None:
        """`key` is what `name` is already: a head that an embedding is tied to."""
        raise NotImplementedError

    def _check_complete(self) -> None:
        """Compares names before anything is read. What the spec has no place for means that the model is another one
        than it seems."""
        spec = self.spec
        self._check_rotation()
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

    def _check_rotation(self) -> None:
        """That x of a projection is rotated for all of its linears, or for none."""
        rotation = self.checkpoint.record.rotation
        for projection in self.spec.parts(Projection) if rotation else ():
            names = [linear.name for linear in projection.linears if linear.name in self.formats]
            if len({rotation.get(name, 0) for name in names}) > 1:
                raise Unsupported(f"{', '.join(names)} share an input, and are not rotated alike")

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

    def _packed_rows(self, table: Table) -> bool:
        """Whether rows are read from the checkpoint's own bytes: where nothing multiplies by them."""
        source = self._source(table.name)
        return source in self.formats and source != self._source(self.spec.head.name)

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
        if name not in self._known:
            self._check_shape(name, shape)
            self._known[name] = self._put_prepared(name, self.checkpoint.packed(name))
        if key != name:
            self._known[key] = self._known[name]
            self._put_again(key, name)

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
            self._known[table.name] = self._put_rows(table.name, self.checkpoint.packed(source))

    def _tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of the model's shape and a dtype of floats, both compared before it is read."""
        dtype, found = self.checkpoint.described(name)
        if dtype not in FLOATS or list(found) != list(shape):
            expected = f"{' or '.join(FLOATS)} {list(shape)}"
            raise self._edited(f"has {name} as {dtype} {list(found)}, expected {expected}")
        return self.checkpoint.tensor(name)

    def _elements(self, key: str, tensor: Tensor) -> None:
        self._known[key] = self._put_elements(key, tensor.contiguous())

    def _array(self, array: Array) -> None:
        if array.key not in self._known:
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
        self.tables.append(table)

    def _bytes_per_token(self) -> int:
        """Of the weights that one decoded token reads: of experts as many as it is routed to, of embeddings a row."""
        looked_up = {self._known[t.name][0] for t in self.spec.parts(Table)} - {self._known[self.spec.head.name][0]}
        sizes = {self._known[t.name]: 1.0 for t in (self.spec.head,)}
        for linear in self.spec.parts(Linear):
            sizes[self._known[linear.name]] = 1.0
            if linear.bias:
                sizes[self._known[f"{linear.name}.bias"]] = 1.0
        for array in self.spec.parts(Array):
            sizes[self._known[array.key]] = 1.0
        for mixture in self.spec.parts(Mixture):
            share = mixture.router.top_k / len(mixture.experts)
            for linear in expert_linears(mixture):
                sizes[self._known[linear.name]] = share
        return round(sum(size * share for (address, size), share in sizes.items() if address not in looked_up))


def expert_linears(mixture: Mixture) -> list[Linear]:
    """Of all experts but a shared one."""
    return [linear for expert in mixture.experts for linear in (*expert.in_.linears, *expert.down.linears)]
