"""Stand-ins for CUDA graphs, which run on any device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NoHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: reading the device's values, making tensors of Python's."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not re.search("_local_scalar_dense|nonzero|masked_select|lift_fresh|unique|aten.equal", str(op)), op
        return op(*args, **(kwargs or {}))


class Recorded:
    """In place of CUDA graphs: runs a step again, if it could be captured, and notes how often."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            with NoHost():
                return step()

        return replay
