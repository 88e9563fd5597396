"""Weights of a whole model that were made elsewhere: the search's bank."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from amq.model.inventory import Inventory, get_linear
from amq.model.paging import holding
from amq.quantize.bank import WeightBank
from amq.quantize.blocks import BlockResult, install, relative_error


class BankSource:
    """Assembles a configuration {linear: format} from a bank: seconds, and exactly the model that the search judged."""

    def __init__(self, model: nn.Module, inventory: Inventory, formats: Mapping[str, str], bank: WeightBank) -> None:
        self._model, self._inventory, self._formats, self._bank = model, inventory, formats, bank

    @property
    def key(self) -> str:
        """What names the bank's content: model, quantizer, group size, calibration windows."""
        return self._bank.folder.name

    def make(self, block: int) -> BlockResult:
        result = BlockResult()
        with holding(self._model, block):
            for spec in self._inventory.in_block(block):
                packed = self._bank.get(spec.name, self._formats[spec.name])
                weight = get_linear(self._model, spec.name).weight.detach()
                result.packed[spec.name] = packed
                result.errors[spec.name] = relative_error(weight, packed, None)
        return result

    def finish(self, result: BlockResult) -> None:
        install(self._model, result)
