"""The linear op: y = x · Wᵀ (+ bias) for prepared weights, and its fused form for several linears that share x.

`linear` checks and calls `torch.ops.amq.linear`, which dispatches to the backend that the weights were prepared for;
`grouped_linear` likewise, for weights that have rows of x of their own: experts. The ops have fake kernels, so
torch.compile takes each as one node. Gradients do not flow through it; they do through the
linears of a loaded checkpoint (`amq.kernels.modules.StoredLinear`), which hold what a backward needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import check_group_size, get_format
from amq.kernels.backends import ACTIVATIONS, DTYPES, default_activations, get_backend
from amq.packing import PreparedWeight, check_fused, check_rotation
from amq.rotation import rotate

_LIBRARY = torch.library.Library("amq", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] weights, str[] formats, int[] out_features, int group_size, Tensor? bias, "
    "str activations, str backend, int rotation=0) -> Tensor"
)
_LIBRARY.define(
    "grouped_linear(Tensor x, Tensor[] weights, str[] formats, int[] sizes, int out_features, int group_size, "
    "Tensor?[] biases, str activations, str backend, int rotation=0) -> Tensor"
)
OP = "torch.ops.amq.linear"
GROUPED = "torch.ops.amq.grouped_linear"


def linear(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    bias: Tensor | None = None,
    activations: str | None = None,
    name: str = "linear",
) -> Tensor:
    """y[…, ΣN] = x[…, K] · Wᵀ for every weight, side by side in the order of `weights`.

    x: float32, bfloat16 or float16 [..., K], on the device of the weights; copied if it is not contiguous. y has its
        dtype. GPU backends take bfloat16 and float16 only. Products of codes are exact and summed in float32, but for
        Triton's at many rows, which multiplies with weights rounded to x's dtype, as torch does.
    weights: of one backend, in_features (K), group size and rotation; each in its own format. One call, one parallel
        region. Rotated weights multiply x rotated (`amq.rotation`), which is done here or in the backend; int8 rounds x
        after that.
    bias: [ΣN], any of the dtypes, or None.
    activations: `fp32` multiplies x as it is; NaN and infinity in x propagate as in torch (a group is summed before it
        is scaled, so that x beyond 1e34 may overflow where torch does not; on a GPU, an infinity may give NaN). `int8`
        rounds x per row and group to a · q, a = max|x|/127 and q an integer: |y − y_fp32| ≤ Σ_groups a/2 · Σ_group |W|.
        None takes `backends.default_activations`. A NaN or an infinity in a row makes all of its outputs NaN. A
        row's result does not depend on the rows beside it (on a GPU: nor on how many there are, up to rounding).
    name: what to call this linear in errors.
    Raises AmqError, and computes nothing, where these do not fit together.
    """
    check_fused(weights, ("backend", "in_features", "group_size", "rotation"), name)
    activations = activations or default_activations(weights[0].backend)
    _check_input(x, weights, bias, activations, name)
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return _run(x, weights, bias, activations, name)  # without torch's dispatcher: 7 instead of 26 µs
    return torch.ops.amq.linear(
        x,
        [w.data for w in weights],
        [w.format.name for w in weights],
        [w.out_features for w in weights],
        weights[0].group_size,
        bias,
        activations,
        weights[0].backend,
        weights[0].rotation,
    )


def grouped_linear(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    sizes: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    activations: str | None = None,
    name: str = "linears",
) -> Tensor:
    """y[M, N]: weight i times its `sizes[i]` rows of x[M, K], which lie one after another in the order of `weights`.

    weights: as those of `linear`, of one shape; each in its own format. On the CPU all go in one call, which reads few
        rows' weights as fast as one weight of all these bytes; other backends multiply one after another.
    sizes: rows of each weight, 0 too; they make up all rows of x.
    biases: [N] each, or None.
    x, activations, name and errors: as `linear` has them.
    """
    check_fused(weights, ("backend", "in_features", "out_features", "group_size", "rotation"), name)
    biases = [None] * len(weights) if biases is None else list(biases)
    activations = activations or default_activations(weights[0].backend)
    _check_groups(x, weights, sizes, biases, name)
    for bias in biases:
        _check_bias(bias, weights[0].out_features, weights[0].data.device, name)
    _check_input(x, weights, None, activations, name)
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return _run_grouped(x, weights, sizes, biases, activations, name)
    return torch.ops.amq.grouped_linear(
        x,
        [w.data for w in weights],
        [w.format.name for w in weights],
        list(sizes),
        weights[0].out_features,
        weights[0].group_size,
        biases,
        activations,
        weights[0].backend,
        weights[0].rotation,
    )


def _check_groups(
    x: Tensor, weights: Sequence[PreparedWeight], sizes: Sequence[int], biases: Sequence[Tensor | None], name: str
) -> None:
    if x.ndim != 2 or not len(sizes) == len(weights) == len(biases) or min(sizes) < 0 or sum(sizes) != x.shape[0]:
        raise AmqError(
            f"{name}: expected x [rows, {weights[0].in_features}], and for each of {len(weights)} weights a bias or "
            f"None and a number of rows, which make up those of x; got x {list(x.shape)}, {len(biases)} biases and "
            f"{list(sizes)} rows"
        )


def _check_input(
    x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str, name: str
) -> None:
    in_features, device = weights[0].in_features, weights[0].data.device
    for weight in weights:
        data = weight.data  # kernels read it by its address: as many bytes as its shape says, one after another
        if data.dtype is not torch.uint8 or data.dim() != 1 or not data.is_contiguous() or data.device != device:
            raise AmqError(
                f"{name}: the data of a prepared weight must be uint8, of one dimension, contiguous and on {device}, "
                f"got {data.dtype} {list(data.shape)} with strides {list(data.stride())} on {data.device}; "
                "make it with amq.kernels.backends.prepare"
            )
        if not 0 <= weight.out_features <= data.numel():  # before y is allocated; the backend compares all of them
            raise AmqError(
                f"{name}: bytes of a {weight.format.name} weight of {weight.out_features} rows: expected at least one "
                f"a row, got {data.numel()}"
            )
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise AmqError(f"{name}: x must be [..., {in_features}], got {list(x.shape)}")
    check_rotation(weights[0].rotation, in_features, name)
    backend = get_backend(weights[0].backend)
    if x.dtype not in backend.dtypes:
        able = " or ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        raise AmqError(
            f"{name}: x must be {able} for backend {backend.name}, got {x.dtype}; "
            f"convert it with x.to({backend.dtypes[0]})"
        )
    if x.device != device:
        raise AmqError(f"{name}: x is on {x.device}, its weight on {device}; move one of them")
    if activations not in ACTIVATIONS:
        raise AmqError(f"{name}: activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if activations not in backend.activations:
        able = ", ".join(backend.activations)
        raise AmqError(f"{name}: backend {backend.name} takes activations {able}, not {activations}")
    if backend.device not in (None, device.type) and device.type != "meta":
        raise AmqError(
            f"{name}: backend {backend.name} multiplies on {backend.device}, its weight is on {device}; "
            "move the weight and x there, or prepare the weight for another backend"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise AmqError(
            f"{name}: a prepared weight has no gradient: call it under torch.no_grad(), or load a checkpoint with "
            "transformers, whose linears have one"
        )
    _check_bias(bias, sum(w.out_features for w in weights), device, name)


def _check_bias(bias: Tensor | None, out_features: int, device: torch.device, name: str) -> None:
    if bias is None or (tuple(bias.shape) == (out_features,) and bias.dtype in DTYPES and bias.device == device):
        return
    raise AmqError(
        f"{name}: bias must be float32, bfloat16 or float16 [{out_features}] on {device}, "
        f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
    )


def _linear(
    x: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[str],
    out_features: Sequence[int],
    group_size: int,
    bias: Tensor | None,
    activations: str,
    backend: str,
    rotation: int = 0,
) -> Tensor:
    if not len(weights) == len(formats) == len(out_features) > 0 or x.ndim == 0:
        raise AmqError(
            f"{OP}: expected at least one weight, a format and a number of rows for each, and x [..., in_features], "
            f"got {len(weights)} weights, {len(formats)} formats, {len(out_features)} numbers and x {list(x.shape)}"
        )
    in_features, group_size = x.shape[-1], check_group_size(group_size)
    prepared = [
        PreparedWeight(backend, get_format(fmt), n, in_features, group_size, data, rotation)
        for data, fmt, n in zip(weights, formats, out_features, strict=True)
    ]
    _check_input(x, prepared, bias, activations, OP)
    return _run(x, prepared, bias, activations, OP)


def _grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    formats: Sequence[str],
    sizes: Sequence[int],
    out_features: int,
    group_size: int,
    biases: Sequence[Tensor | None],
    activations: str,
    backend: str,
    rotation: int = 0,
) -> Tensor:
    if not len(weights) == len(formats) == len(sizes) > 0 or x.ndim != 2:
        raise AmqError(
            f"{GROUPED}: expected at least one weight, a format and a number of rows for each, and x [rows, "
            f"in_features], got {len(weights)} weights, {len(formats)} formats, {len(sizes)} numbers and x "
            f"{list(x.shape)}"
        )
    group_size = check_group_size(group_size)
    prepared = [
        PreparedWeight(backend, get_format(fmt), out_features, x.shape[1], group_size, data, rotation)
        for data, fmt in zip(weights, formats, strict=True)
    ]
    _check_groups(x, prepared, sizes, biases, GROUPED)
    for bias in biases:
        _check_bias(bias, out_features, weights[0].device, GROUPED)
    _check_input(x, prepared, None, activations, GROUPED)
    return _run_grouped(x, prepared, sizes, biases, activations, GROUPED)


def _run_grouped(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    sizes: Sequence[int],
    biases: Sequence[Tensor | None],
    activations: str,
    name: str,
) -> Tensor:
    flat = [None if bias is None else bias.contiguous() for bias in biases]
    try:
        return get_backend(weights[0].backend).group(
            _rotated(x, weights).contiguous(), weights, sizes, flat, activations
        )
    except AmqError as error:
        raise AmqError(f"{name}: {error}") from error


def _run(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str, name: str) -> Tensor:
    rows = _rotated(x.reshape(-1, x.shape[-1]), weights).contiguous()
    bias = None if bias is None else bias.contiguous()
    try:
        y = get_backend(weights[0].backend).linear(rows, weights, bias, activations)
    except AmqError as error:  # of bytes that are not those of a weight's shape, say
        raise AmqError(f"{name}: {error}") from error
    return y.view(*x.shape[:-1], y.shape[1])


def _rotated(x: Tensor, weights: Sequence[PreparedWeight]) -> Tensor:
    """What the backend of `weights` is given for x."""
    if not weights[0].rotation or get_backend(weights[0].backend).rotates:
        return x
    return rotate(x)


def _fake_linear(
    x: Tensor, weights: Sequence[Tensor], formats: Sequence[str], out_features: Sequence[int], *_: object
) -> Tensor:
    for weight in weights:  # what is on meta alone comes here too, and would get a y that nobody computed
        if weight.device != x.device:
            raise AmqError(f"{OP}: x is on {x.device}, its weight on {weight.device}; move one of them")
    return x.new_empty(*x.shape[:-1], sum(out_features))


def _fake_grouped(
    x: Tensor, weights: Sequence[Tensor], formats: Sequence[str], sizes: Sequence[int], out_features: int, *_: object
) -> Tensor:
    for weight in weights:
        if weight.device != x.device:
            raise AmqError(f"{GROUPED}: x is on {x.device}, its weight on {weight.device}; move one of them")
    return x.new_empty(x.shape[0], out_features)


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
torch.library.register_fake("amq::grouped_linear", _fake_grouped, lib=_LIBRARY)
torch.library.register_fake("amq::linear", _fake_linear, lib=_LIBRARY)
