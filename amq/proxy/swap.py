"""LinearSwap: puts configurations into a resident model, touching only the linears whose format changes.

With the backend `reference` a linear keeps its module, and its weight becomes a working buffer that the bank's weight
is dequantized into. With a kernel backend the module itself gives way to a `QuantizedLinear`, so that the model
computes with the codes, as it will when deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import KEPT
from amq.kernels.backends import check_activations
from amq.kernels.cpu import dequantize_into
from amq.kernels.modules import QuantizedLinear
from amq.model.inventory import get_linear
from amq.quantize.bank import WeightBank


class LinearSwap:
    """The quantizable linears of `model`, by dotted name; backend and activations as in `amq.kernels.backends`."""

    def __init__(
        self, model: nn.Module, names: Iterable[str], backend: str = "reference", activations: str = "fp32"
    ) -> None:
        check_activations(backend, activations)
        self._backend, self._activations = backend, activations
        self._linears = {name: get_linear(model, name) for name in names}
        self._parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._linears}
        self._full = {name: module.weight.data for name, module in self._linears.items()}
        self._buffers: dict[str, Tensor] = {}
        self._current: dict[str, tuple[WeightBank, str]] = {}

    def apply(self, formats: Mapping[str, str], bank: WeightBank) -> None:
        """Puts {linear: format} into the model, weights taken from `bank`; those that are kept get their own again."""
        if formats.keys() != self._linears.keys():
            odd = sorted(formats.keys() ^ self._linears.keys())[0]
            raise AmqError(f"the configuration and the model disagree about linear {odd!r}")
        for name, fmt in formats.items():
            if self._current.get(name) != (bank, fmt):
                self._current.pop(name, None)  # a failure below must not leave a wrong note of what is there
                self._put_format(name, fmt, bank)
                self._current[name] = (bank, fmt)

    def _put_format(self, name: str, fmt: str, bank: WeightBank) -> None:
        if fmt == KEPT.name:
            self._put_back(name)
        elif self._backend == "reference":
            self._dequantize(name, fmt, bank)
        else:
            self._replace(name, fmt, bank)

    def _dequantize(self, name: str, fmt: str, bank: WeightBank) -> None:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = torch.empty_like(self._full[name])
        dequantize_into(bank.get(name, fmt), buffer)
        self._linears[name].weight.data = buffer

    def _replace(self, name: str, fmt: str, bank: WeightBank) -> None:
        packed = bank.get(name, fmt).to(self._full[name].device)
        module = QuantizedLinear.from_packed(packed, self._linears[name].bias, self._backend, self._activations, name)
        self._put(name, module)

    def _put(self, name: str, module: nn.Module) -> None:
        setattr(self._parents[name], name.rpartition(".")[2], module)

    def restore(self) -> None:
        """Puts the full-precision linears back."""
        for name in self._linears:
            self._put_back(name)
        self._current.clear()

    def _put_back(self, name: str) -> None:
        self._linears[name].weight.data = self._full[name]
        self._put(name, self._linears[name])

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The full-precision model inside, the configuration that was applied afterwards."""
        applied = dict(self._current)
        self.restore()
        try:
            yield
        finally:
            if applied:
                (bank,) = {bank for bank, _ in applied.values()}
                self.apply({name: fmt for name, (_, fmt) in applied.items()}, bank)
