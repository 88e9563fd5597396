"""`amq._cpu`, the compiled CPU kernels, and how tensors are named to it; typed bindings are where they are used."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from torch import Tensor

from amq.errors import AmqError


@lru_cache(maxsize=1)
def cpu_module() -> ModuleType:
    """`amq._cpu`, or an error that says how to build it. torch is imported first: both then share OpenMP threads.

    Raises AmqError too where AMQ_CPU_ISA names an instruction set that this machine cannot run.
    """
    try:
        import amq._cpu as _cpu
    except ImportError as error:
        raise AmqError(
            f"the native module amq._cpu cannot be imported ({error}); build it with `pip install -e .` in a checkout "
            "of amq (running Python inside a checkout uses that checkout, not an installed amq)"
        ) from error
    try:
        _cpu.isa()
    except ValueError as error:
        raise AmqError(str(error)) from None
    return _cpu


def memory(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of a contiguous tensor: how `amq._cpu` takes it, to compare with what it would read or write."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()  # not nbytes, which torch.compile cannot trace


NO_MEMORY = (0, 0)
"""In place of a tensor that may be left out."""
