"""Linears whose weight stays in its bit format and is multiplied by a backend's kernel.

`QuantizedLinear` holds a prepared weight. `StoredLinear` belongs to a checkpoint: it holds the packed weight as the
file gave it (memory-mapped, on the CPU) and prepares it when it first meets an input on a device, so that loading costs
nothing, `.to(device)` and device maps need no care, and the model can be saved again bit for bit.

Gradients flow through StoredLinears to their inputs and biases, so that an adapter beside them can be trained: the
backward multiplies with the dequantized weight. The packed weight itself is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels.backends import check_activations, choose_backend, default_activations, get_backend, prepare
from amq.kernels.dense import dequantize_into, dequantized
from amq.kernels.ops import grouped_linear, linear
from amq.packing import PARTS, PackedWeight, PreparedWeight


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ (+ bias), float32, bfloat16 or float16 in and out, [..., in_features] → [..., out_features].

    weight: prepared; its bytes are a buffer of the module, and not in its state dict, because the layout is the
        backend's: a checkpoint stores the packed weight.
    bias: [out_features] or None.
    activations: `int8` or `fp32`, None for the backend's default; see `amq.kernels.ops.linear`.
    name: the linear's dotted name in its model, for errors.
    """

    def __init__(
        self,
        weight: PreparedWeight,
        bias: Tensor | None = None,
        activations: str | None = None,
        name: str = "linear",
    ) -> None:
        nn.Module.__init__(self)
        self.data: Tensor
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.activations, self.name = activations or default_activations(weight.backend), name
        self._weight = weight
        self.register_buffer("data", weight.data, persistent=False)
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        backend: str = "cpu",
        activations: str | None = None,
        name: str = "linear",
    ) -> QuantizedLinear:
        """Prepares `packed` for `backend`; drop `packed` afterwards to hold the weight only once."""
        return cls(prepare(packed, backend), bias, activations, name)

    @property
    def weight(self) -> PreparedWeight:
        if self.data is not self._weight.data:  # torch moved or replaced the buffer
            self._weight = replace(self._weight, data=self.data)
        return self._weight

    def prepared(self, device: torch.device) -> PreparedWeight:
        """The weight for an input on `device`, where it has to be already."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, (self.weight,), self.bias, self.activations, self.name)

    @staticmethod
    def grouped(linears: Sequence[QuantizedLinear], x: Tensor, sizes: Sequence[int]) -> Tensor:
        """[rows, out_features]: linear i times its `sizes[i]` rows of x, in one call (`amq.model.experts`)."""
        first, last = linears[0], linears[-1]
        name = first.name if first is last else f"{first.name} … {last.name}"
        weights, biases = [module.prepared(x.device) for module in linears], [module.bias for module in linears]
        return grouped_linear(x, weights, sizes, biases, first.activations, name)

    def extra_repr(self) -> str:
        weight = self._weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={weight.format.name}, group_size={weight.group_size}, backend={weight.backend}, "
            f"activations={self.activations}"
        )


@dataclass(frozen=True)
class Execution:
    """How the linears of one model are multiplied.

    backend: a name in `amq.kernels.backends.BACKENDS`, or None for the first that runs all `formats` on the input's
        device.
    """

    activations: str
    backend: str | None
    formats: tuple[str, ...]

    def backend_on(self, device: torch.device) -> str:
        """Raises AmqError where the backend lacks `activations`."""
        name = self.backend or _choose(self.formats, str(device))
        check_activations(name, self.activations)
        return name


_choose = cache(choose_backend)  # it logs what it passes over: once per model and device is enough


class QuantizedWeight:
    """What a StoredLinear has for a `weight`: where it is and how large, for those who ask, and no numbers."""

    dtype = torch.uint8
    requires_grad = False

    def __init__(self, linear: str, shape: tuple[int, int], device: torch.device) -> None:
        self._linear, self.shape, self.device = linear, torch.Size(shape), device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NoPlainWeight(
            f"{self._linear} is quantized, its weight has no {name!r}: nothing can be merged into it; call "
            "model.dequantize() first"
        )


class NoPlainWeight(AmqError, AttributeError):
    """Someone asked a quantized weight for what only a plain one has."""


class PackedState(nn.Module):
    """What saves and loads a packed weight as three tensors of the state dict: `qweight`, `scale` and `zero_point`.

    packed: the weight on the CPU, not copied and never moved; None until the model is loaded.
    layout: its format, in_features, group size and rotation.
    """

    packed: PackedWeight | None
    layout: tuple[BitFormat, int, int, int]

    def store(self, packed: PackedWeight) -> None:
        """Takes the weight, which has the format and shape that this module was made for."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:
            destination.update({prefix + part: tensor for part, tensor in self.packed.parts.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        names = [prefix + part for part in PARTS]
        missing = [name for name in names if name not in state_dict]
        if missing:
            missing_keys.extend(missing if strict else [])
        else:
            fmt, in_features, group_size, rotation = self.layout
            parts = (state_dict[name].cpu() for name in names)
            self.store(PackedWeight(fmt, in_features, group_size, *parts, rotation=rotation))
        rest = {name: tensor for name, tensor in state_dict.items() if name not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, *args)


class StoredLinear(PackedState, QuantizedLinear, nn.Linear):  # type: ignore[misc]  # its bias may be None
    """A QuantizedLinear of a checkpoint; state dict: `qweight`, `scale`, `zero_point` and `bias`.

    It is an nn.Linear to those who look for linears by type, as PEFT does for the places of its adapters.

    place: the device that the rest of the model is on, as far as is known before an input comes.
    """

    place: torch.device

    def __init__(
        self,
        fmt: BitFormat,
        shape: tuple[int, int],
        group_size: int,
        execution: Execution,
        bias: Tensor | None = None,
        name: str = "linear",
        rotation: int = 0,
    ) -> None:
        stored = PreparedWeight("", fmt, *shape, group_size, unprepared(fmt, shape, group_size), rotation)
        QuantizedLinear.__init__(self, stored, bias, execution.activations, name)
        self.execution, self.packed, self.layout = execution, None, (fmt, shape[1], group_size, rotation)
        self.place = torch.device("cpu")

    def store(self, packed: PackedWeight) -> None:
        """Takes the weight, which has the format and shape that this linear was made for."""
        self.packed = packed
        self._forget()

    def _forget(self) -> None:
        shape, group_size = (self.out_features, self.in_features), self._weight.group_size
        self.data = unprepared(self._weight.format, shape, group_size)
        self._weight = replace(self._weight, backend="", data=self.data)

    def prepared(self, device: torch.device) -> PreparedWeight:
        """The weight on `device`, prepared now if it is not there yet."""
        weight = self._weight  # read once: another thread may prepare too
        if weight.backend and weight.data.device == device:
            return weight
        if self.packed is None:
            raise AmqError(f"{self.name} has no weight yet: load it with from_pretrained, or give it one with store()")
        try:
            weight = prepare(self.packed.to(device), self.execution.backend_on(device))
        except AmqError as error:
            raise AmqError(f"{self.name}: {error}") from None
        self._weight, self.data, self.place = weight, weight.data, device
        return weight

    def lends_rows(self, device: torch.device) -> bool:
        """Whether an embedding on `device` can read the weight that this linear multiplies with: it is prepared there,
        or nowhere yet, by a backend that can."""
        weight = self._weight
        if weight.backend and weight.data.device != device:
            return False
        return get_backend(weight.backend or self.execution.backend_on(device)).rows is not None

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [n] of the prepared weight in `dtype`, [n, in_features]; where it `lends_rows` on their device."""
        weight = self.prepared(ids.device)
        look_up = get_backend(weight.backend).rows
        assert look_up is not None
        return look_up(weight, ids, dtype)

    @property
    def weight(self) -> QuantizedWeight | Tensor:  # type: ignore[override]  # the one lie of this nn.Linear
        """No numbers; while transformers loads, an empty tensor, for models that initialise weights by hand."""
        shape = (self.out_features, self.in_features)
        if self.packed is None:
            return torch.empty(shape, device="meta")
        return QuantizedWeight(self.name, shape, self.place)

    def forward(self, x: Tensor) -> Tensor:
        """With gradients to x and the bias where they want them."""
        wanted = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            return _differentiable(x, self)
        return self.product(x)

    @staticmethod
    def grouped(linears: Sequence[StoredLinear], x: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[override]
        """As `QuantizedLinear.grouped`; one after another where there are gradients to keep."""
        wanted = x.requires_grad or any(m.bias is not None and m.bias.requires_grad for m in linears)
        if wanted and torch.is_grad_enabled():
            return torch.cat([m(rows) for m, rows in zip(linears, x.split(list(sizes)), strict=True)])
        return QuantizedLinear.grouped(linears, x, sizes)

    def product(self, x: Tensor) -> Tensor:
        return linear(x, (self.prepared(x.device),), self.bias, self.activations, self.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        if self.packed is None:
            return super()._apply(fn, recurse)
        before = self.data
        self._buffers["data"] = None  # not moved with the rest
        super()._apply(fn, recurse)
        self.place = fn(torch.empty(0)).device
        if not before.is_meta and fn(before) is before:
            self.data = before
        else:
            self._forget()  # the layout of one device's backend is of no use on another
        return self


def unprepared(fmt: BitFormat, shape: tuple[int, int], group_size: int) -> Tensor:
    """An empty buffer of the packed weight's size, until it is prepared: device maps and footprints count buffers."""
    return torch.empty(fmt.stored_bytes(*shape, group_size), dtype=torch.uint8, device="meta")


@torch.compiler.disable  # the backward calls native code, which dynamo cannot trace
def _differentiable(x: Tensor, module: StoredLinear) -> Tensor:
    return _Product.apply(x, module.bias, module)


class _Product(torch.autograd.Function):
    """Rounding of activations to int8 has the gradient 1, as if they were not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: StoredLinear) -> Tensor:
        ctx.packed, ctx.bias = module.packed, bias if bias is None else bias.dtype
        return module.product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ _dense(ctx.packed, gradient)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias)
        return to_x, to_bias, None


def _dense(packed: PackedWeight, like: Tensor) -> Tensor:
    """The weight [out_features, in_features] with the device and dtype of `like`."""
    if like.device.type == "cpu":
        return dequantized(packed).to(like.dtype)
    weight = like.new_empty(packed.out_features, packed.in_features)
    dequantize_into(packed, weight)
    return weight
