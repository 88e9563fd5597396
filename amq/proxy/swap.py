"""LinearSwap: puts configurations into a model, touching only the weights whose format changes.

With the backend `reference` a linear keeps its module, and its weight becomes a working buffer that the bank's weight
is dequantized into. With a kernel backend the module itself gives way to a `QuantizedLinear`, so that the model
computes with the codes, as it will when deployed. An embedding, and that of a tied head, looks up dequantized rows in
both cases: these are the numbers that its codes stand for.

What a weight was made into is kept for as long as there is room (`memory`), the last one always: several
configurations that go through a block together take turns for the price of an assignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import KEPT
from amq.kernels.backends import check_activations
from amq.kernels.dense import dequantize_into
from amq.kernels.modules import QuantizedLinear
from amq.model.inventory import get_weight
from amq.packing import PackedWeight
from amq.proxy.resident import BankReader


@dataclass
class _Made:
    """A weight in one format, as the model computes with it: dequantized, prepared for a kernel, or both (tied)."""

    weight: Tensor | None = None
    module: QuantizedLinear | None = None

    @property
    def nbytes(self) -> int:
        dense = 0 if self.weight is None else self.weight.nbytes
        return dense + (0 if self.module is None else self.module.data.nbytes)


class LinearSwap:
    """The quantizable weights of `model`, by dotted name; backend and activations as in `amq.kernels.backends`.

    names: the linears that every configuration names. outer: head and embeddings, which it may leave out: they are
        in full precision then.
    memory: bytes that weights may take which are ready and not in use.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        backend: str = "reference",
        activations: str = "fp32",
        outer: Iterable[str] = (),
        memory: int = 0,
    ) -> None:
        check_activations(backend, activations)
        self._backend, self._activations, self._memory = backend, activations, memory
        self._names, self._outer = frozenset(names), frozenset(outer)
        self._modules = {name: model.get_submodule(name) for name in (*self._names, *self._outer)}
        looked_up = {id(m._parameters["weight"]) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._looked_up = {n for n in self._outer if id(get_weight(model, n)) in looked_up}
        self._parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._modules}
        self._full: dict[str, Tensor] = {}  # of those that are not in the model
        self._made: dict[str, dict[str, _Made]] = {}  # name → format → made, the one that was used last at the end
        self._spare = 0  # bytes of what is made, without the last of each weight
        self._bank: BankReader | None = None
        self._current: dict[str, str] = {}  # what is not here is in full precision

    def check(self, formats: Mapping[str, str]) -> None:
        """Raises AmqError where a configuration names other linears than the model has."""
        odd = sorted((self._names - formats.keys()) | (formats.keys() - self._names - self._outer))
        if odd:
            raise AmqError(f"the configuration and the model disagree about linear {odd[0]!r}")

    def apply(self, formats: Mapping[str, str], bank: BankReader) -> None:
        """Puts {linear: format} into the model, weights taken from `bank`; those that are kept get their own again."""
        self.check(formats)
        self.put({**dict.fromkeys(self._outer, KEPT.name), **formats}, bank)

    def put(self, formats: Mapping[str, str], bank: BankReader) -> None:
        """Puts these weights into the model and leaves all others as they are."""
        if bank is not self._bank:
            self.release(self._modules)
            self._bank = bank
        for name, fmt in formats.items():
            if self._current.get(name, KEPT.name) == fmt:
                continue
            self._put_back(name)  # a failure below must not leave a wrong note of what is there
            if fmt != KEPT.name:
                self._install(name, self._make(name, fmt, bank))
                self._current[name] = fmt

    def _make(self, name: str, fmt: str, bank: BankReader) -> _Made:
        """name: of a weight that is in full precision at the moment."""
        made = self._made.setdefault(name, {})
        if fmt not in made:
            packed = bank.get(name, fmt)
            old = self._make_room(made)
            self._remember(made, fmt, self._new(name, packed, old))
        else:
            self._remember(made, fmt, made[fmt])
        return made[fmt]

    def _remember(self, made: dict[str, _Made], fmt: str, new: _Made) -> None:
        """Makes `new` the last of a weight."""
        before = _spare(made)
        made.pop(fmt, None)
        made[fmt] = new
        self._spare += _spare(made) - before

    def _make_room(self, made: dict[str, _Made]) -> _Made:
        """Drops of a weight what is over `memory` once all of it is spare; returns what was dropped last."""
        dropped = _Made()
        while made and self._spare - _spare(made) + sum(m.nbytes for m in made.values()) > self._memory:
            before = _spare(made)
            dropped = made.pop(next(iter(made)))
            self._spare += _spare(made) - before
        return dropped

    def _new(self, name: str, packed: PackedWeight, old: _Made) -> _Made:
        """old: of the same weight and not in use; its buffer is written over."""
        module = self._modules[name]
        full = _weight(module)
        made = _Made()
        if self._backend == "reference" or name in self._looked_up:
            made.weight = torch.empty(full.shape, dtype=full.dtype, device=full.device)
            if old.weight is not None:
                made.weight = old.weight
            dequantize_into(packed, made.weight)
        if self._backend != "reference" and isinstance(module, nn.Linear):
            made.module = QuantizedLinear.from_packed(
                packed.to(full.device), module.bias, self._backend, self._activations, name
            )
        return made

    def _install(self, name: str, made: _Made) -> None:
        if made.weight is not None:
            weight = _weight(self._modules[name])
            self._full[name] = weight.data
            weight.data = made.weight
        if made.module is not None:
            self._put_module(name, made.module)

    def _put_module(self, name: str, module: nn.Module) -> None:
        setattr(self._parents[name], name.rpartition(".")[2], module)

    def _put_back(self, name: str) -> None:
        if self._current.pop(name, None) is None:
            return
        self._put_module(name, self._modules[name])
        if (full := self._full.pop(name, None)) is not None:
            _weight(self._modules[name]).data = full

    def restore(self) -> None:
        """Puts the full-precision weights back."""
        for name in list(self._current):
            self._put_back(name)

    def trim(self, names: Iterable[str]) -> None:
        """Lets go of what was made of these weights and is not in use."""
        for name in names:
            made, used = self._made.pop(name, {}), self._current.get(name)
            self._spare -= _spare(made)
            if used is not None:
                self._made[name] = {used: made[used]}

    def release(self, names: Iterable[str]) -> None:
        """Puts these weights back and lets go of all that was made of them: they are about to leave memory."""
        names = list(names)
        for name in names:
            self._put_back(name)
        self.trim(names)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The full-precision model inside, the configuration that was applied afterwards."""
        applied, bank = dict(self._current), self._bank
        self.restore()
        try:
            yield
        finally:
            if bank is not None:
                self.put(applied, bank)


def _spare(made: dict[str, _Made]) -> int:
    """Bytes of all but the last."""
    return sum(m.nbytes for m in list(made.values())[:-1])


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight
