"""A bank's weights near the GPU that a model is on: in its memory as far as that is allowed, the others in the host's.

A search puts the same few thousand weights into a model again and again. Those that fit `memory` are copied once and
stay. The others are kept in pinned memory, from which the GPU fetches them at the full speed of its bus while the host
goes on; and what half of the host's free memory does not hold is read from the bank's mapped files each time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from amq.formats import BitFormat
from amq.packing import PackedWeight
from amq.util.limits import free_memory, free_on

GPU_SHARE = 4
"""Where nobody says how much: a quarter of what is free, the rest being for working copies, states and logits."""
HOST_SHARE = 2
"""Of the host's free memory, half may be pinned."""


class BankReader(Protocol):
    """What a model's weights are taken from: a `WeightBank`, or one near a GPU."""

    def get(self, linear: str, fmt: str) -> PackedWeight: ...

    def formats_of(self, name: str) -> tuple[BitFormat, ...]: ...


class ResidentBank:
    """`bank` for a model on `device`, a GPU. memory: bytes of weights that stay there; None: a share of what is free.

    `on_device` and `on_host` are the bytes kept so far.
    """

    def __init__(self, bank: BankReader, device: torch.device, memory: int | None = None) -> None:
        self._bank, self._device = bank, device
        self._memory = free_on(str(device)) // GPU_SHARE if memory is None else memory
        self._host_memory = free_memory() // HOST_SHARE
        self._kept: dict[tuple[str, str], PackedWeight] = {}
        self.on_device = self.on_host = 0

    def formats_of(self, name: str) -> tuple[BitFormat, ...]:
        return self._bank.formats_of(name)

    def get(self, linear: str, fmt: str) -> PackedWeight:
        """One weight in one format, on the device."""
        kept = self._kept.get((linear, fmt)) or self._keep(linear, fmt)
        return kept.map(lambda part: part.to(self._device, non_blocking=True))

    def _keep(self, linear: str, fmt: str) -> PackedWeight:
        """What the bank has, kept for the next time where there is room."""
        found = self._bank.get(linear, fmt)
        if self.on_device + found.nbytes <= self._memory:
            self.on_device += found.nbytes
            found = self._kept[linear, fmt] = found.to(self._device)
        elif self.on_host + found.nbytes <= self._host_memory:
            self.on_host += found.nbytes
            found = self._kept[linear, fmt] = found.map(self._pinned)
        return found

    def _pinned(self, part: Tensor) -> Tensor:
        return part.pin_memory() if self._device.type == "cuda" else part.clone()


def near(bank: BankReader, device: torch.device, memory: int | None = None) -> BankReader:
    """`bank` itself for a model on the CPU, else a `ResidentBank`."""
    return bank if device.type == "cpu" else ResidentBank(bank, device, memory)
