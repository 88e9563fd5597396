"""What a pass of a decoder on a GPU is: calls of kernels/cuda/calls.h, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from amq.kernels import cuda_calls as calls
from amq.kernels.cuda_calls import Call, CallLibrary

Part = Call | Callable[[], None]


class PassCalls:
    """The parts of a pass of `rows` rows, in order. run: launches them on a stream."""

    def __init__(self, library: CallLibrary) -> None:
        self._library = library
        self.parts: list[Part] = []

    def add(self, kind: Any, fields: dict[str, Any], label: str, function: str = "") -> None:
        self.parts.append(Call(kind, fields, label, function))

    def share_scratch(self, device: torch.device) -> None:
        """Gives all linears, which run one after another, the scratch of the largest."""
        linears = [part for part in self.parts if isinstance(part, Call) and isinstance(part.struct, calls.LinearCall)]
        most = max((self._library.size("amq_cuda_linear_scratch", call) for call in linears), default=0)
        self._scratch = torch.zeros(most, dtype=torch.uint8, device=device)
        for call in linears:
            call.struct.partials = self._scratch.data_ptr()

    def run(self, stream: int) -> None:
        for part in self.parts:
            if isinstance(part, Call):
                self._library.run(part, stream)
            else:
                part()
