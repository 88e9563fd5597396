"""A stand-in for a GPU: tensors that say they are elsewhere, are computed on the CPU, and refuse to meet tensors there.

They call their device "meta": a torch that is built without CUDA slices and guards tensors of no other device that has
no values. Inside `elsewhere()`, `to_elsewhere(tensor)` makes one, and so does every operation on one and every factory that is
asked for the device. An operation that mixes the devices raises `DeviceMixUp`, as it would on a machine that has a GPU:
save what PyTorch allows there, numbers of no dimension from the CPU and copies. Values are real, so code that looks at
them (`float(x)`, `bool(x.any())`) runs as it does on a GPU, and results can be compared with those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
"""What may read from one device and write to another."""
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
"""Their indices may be on the CPU where the tensor is not: PyTorch moves them."""


class DeviceMixUp(AssertionError):
    """What PyTorch raises as RuntimeError: "Expected all tensors to be on the same device"."""


class Elsewhere(Tensor):
    """See the head of this file. inner: the tensor on the CPU that holds the values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    asked = kwargs.get("device")
    here = [t for t in given if not isinstance(t, Elsewhere) and t.dim()]
    there = [t for t in given if isinstance(t, Elsewhere)]
    allowed = func in COPIES or (func in INDEXING and isinstance(args[0], Elsewhere))
    if here and there and not allowed:
        raise DeviceMixUp(f"{func}: expected all tensors on one device, got {[str(t.device) for t in given]}")
    goes = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda t: t.inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if not goes:
        return out
    out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class _Factories(TorchDispatchMode):
    """Operations without a tensor among their arguments, such as `torch.empty(…, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside, the device that it gives exists."""
    with _Factories():
        yield DEVICE


def to_elsewhere(tensor: Tensor) -> Tensor:
    """A copy of `tensor` over there."""
    return Elsewhere(tensor.detach().clone())


def back(tensor: Tensor) -> Tensor:
    """The values of a tensor that must be over there."""
    assert isinstance(tensor, Elsewhere), f"expected a tensor on {DEVICE}, got one on {tensor.device}"
    return tensor.inner
