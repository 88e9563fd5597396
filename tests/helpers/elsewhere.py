"""A stand-in for a GPU: tensors that say they are elsewhere, are computed on the CPU, and refuse to meet tensors there.

They call their device "meta": a torch that is built without CUDA slices and guards tensors of no other device that has
no values. Inside `elsewhere()`, `to_elsewhere(tensor)` makes one, and so does every operation on one and every factory
that is asked for the device. An operation that mixes the devices raises `DeviceMixUp`, as it would on a machine that
has a GPU: save what PyTorch allows there, numbers of no dimension from the CPU and copies. Values are real: code that
looks at them (`float(x)`, `bool(x.any())`) runs as it does on a GPU, and results can be compared with the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """As `parameter.data = tensor` does: what the wrapper shows of it is what it showed before."""
        assert isinstance(value, Elsewhere) and value.shape == self.shape and value.dtype == self.dtype
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in (*tree_leaves(args), *kwargs.values()) if isinstance(t, Tensor)]
    asked = kwargs.get("device", next((a for a in args if isinstance(a, torch.device)), None))
    here = any(not isinstance(t, Elsewhere) and t.dim() for t in given)
    there = any(isinstance(t, Elsewhere) for t in given)
    if here and there and func not in COPIES and not (func in INDEXING and isinstance(args[0], Elsewhere)):
        raise DeviceMixUp(f"{func}: expected all tensors on one device, got {[str(t.device) for t in given]}")
    out = func(*_inner(args), **{name: _inner(value) for name, value in kwargs.items()})
    if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):  # in place, not an operator
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    goes = there if asked is None else torch.device(asked).type == DEVICE.type
    if not goes:
        return out.clone() if there else out  # what is copied to the CPU shares nothing with what is there
    return tree_map_only(Tensor, Elsewhere, out)


def _inner(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.inner
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return type(value)(map(_inner, value)) if isinstance(value, (list, tuple)) else value


class _Factories(TorchDispatchMode):
    """Operations without a tensor among their arguments, such as `torch.empty(…, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside, the device that it gives exists."""
    with patch.object(torch, "tensor", _tensor), _Factories():
        yield DEVICE


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which makes what it is given on the CPU and copies it where no mode sees it."""
    made = _TENSOR(data, **kwargs)
    return made if device is None else made.to(device)


_TENSOR = torch.tensor


def to_elsewhere(tensor: Tensor) -> Tensor:
    """A copy of `tensor` over there."""
    return Elsewhere(tensor.detach().clone())


def back(tensor: Tensor) -> Tensor:
    """The values of a tensor that must be over there."""
    assert isinstance(tensor, Elsewhere), f"expected a tensor on {DEVICE}, got one on {tensor.device}"
    return tensor.inner
