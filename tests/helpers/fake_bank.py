"""A bank without files, of every weight of a model, for tests of what reads banks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from amq.formats import FORMATS, BitFormat
from amq.model.inventory import get_weight, take_inventory
from amq.packing import PackedWeight, dequantize
from amq.quantize.quantizers import QUANTIZERS


class FakeBank:
    """Every weight of a model, head and embeddings included, rounded to nearest when it is asked for."""

    def __init__(self, model: nn.Module, formats: Sequence[str]) -> None:
        self.formats = tuple(FORMATS[n] for n in formats)
        self.weights = {s.name: get_weight(model, s.name).detach().clone() for s in take_inventory(model).weights}
        self.asked: list[tuple[str, str]] = []

    def formats_of(self, name: str) -> tuple[BitFormat, ...]:
        return self.formats

    def get(self, name: str, fmt: str) -> PackedWeight:
        self.asked.append((name, fmt))
        (found,) = QUANTIZERS["rtn"]([self.weights[name]], [FORMATS[fmt]], 32, None)
        return found[fmt]

    def error(self, name: str, fmt: str) -> Tensor:
        """W − Ŵ, float64."""
        return self.weights[name].double() - dequantize(self.get(name, fmt)).double()
