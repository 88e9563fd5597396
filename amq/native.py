"""The door to the compiled CPU kernels (`amq._cpu`): typed arguments in, addresses and strides out.

`dequantize_into` writes `(codes − zero_point) · scale` as float32, bit-equal to `amq.packing.dequantize` and near the
speed at which memory can be written. It is there to fill one preallocated weight again and again while formats are
tried. For another dtype or device it computes the reference and copies it: that route is the specification, chosen by
the caller's `out`, not a fallback; GPU kernels have doors of their own.

`jensen_shannon` is `amq.losses.jensen_shannon` after `log_softmax`, fused: the candidate's logits are read twice, the
reference once, and nothing of their size is written.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.packing import PackedWeight, dequantize


def cpu_module() -> ModuleType:
    """`amq._cpu`, or an error that says how to build it. torch is imported first: both then share OpenMP threads."""
    try:
        from amq import _cpu
    except ImportError as error:
        raise AmqError(
            f"the native module amq._cpu cannot be imported ({error}); build it with `pip install -e .` in a checkout "
            "of amq (running Python inside a checkout uses that checkout, not an installed amq)"
        ) from error
    return _cpu


def dequantize_into(packed: PackedWeight, out: Tensor) -> None:
    """Overwrite `out` with the dequantized weight.

    packed: any format and group size; for the native route on CPU and contiguous.
    out: [out_features, in_features], contiguous; float32 on CPU takes the native route, anything else the reference.
    """
    shape = (packed.out_features, packed.in_features)
    if tuple(out.shape) != shape:
        raise AmqError(f"dequantize {packed.format.name}: out must be {list(shape)}, got {list(out.shape)}")
    if not out.is_contiguous():
        raise AmqError(f"dequantize {packed.format.name}: out must be contiguous, got strides {list(out.stride())}")
    if out.device.type != "cpu" or out.dtype != torch.float32:
        out.copy_(dequantize(packed))
        return
    _check_native(packed)
    _dequantize_rows(packed, out)


def _check_native(packed: PackedWeight) -> None:
    for field in ("qweight", "scale", "zero_point"):
        tensor = getattr(packed, field)
        if tensor.device.type != "cpu":
            raise AmqError(f"dequantize {packed.format.name}: {field} must be on cpu as out is, got {tensor.device}")
        if not tensor.is_contiguous():
            raise AmqError(
                f"dequantize {packed.format.name}: {field} must be contiguous, got strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )
    fmt = packed.format
    compiled = cpu_module().formats()
    if compiled.get(fmt.name) != [fmt.levels, fmt.unit_codes, fmt.unit_bytes]:
        raise AmqError(
            f"format {fmt.name} with {fmt.levels} levels, {fmt.unit_codes} codes in {fmt.unit_bytes} bytes is not "
            f"compiled into amq._cpu, which has {compiled}; rebuild it with `pip install -e .`"
        )


def _dequantize_rows(packed: PackedWeight, out: Tensor, isa: str = "") -> None:
    """The call itself; `isa` forces one of `cpu_module().isas()`, the empty string means the best."""
    cpu_module().dequantize(
        format=packed.format.name,
        qweight=packed.qweight.data_ptr(),
        scale=packed.scale.data_ptr(),
        zero_point=packed.zero_point.data_ptr(),
        out=out.data_ptr(),
        qweight_stride=packed.qweight.shape[1],
        group_stride=packed.scale.shape[1],
        out_stride=out.shape[1],
        rows=packed.out_features,
        in_features=packed.in_features,
        group_size=packed.group_size,
        threads=torch.get_num_threads(),
        isa=isa,
    )


def jensen_shannon(reference: Tensor, logits: Tensor) -> Tensor:
    """Jensen–Shannon divergence of softmax(logits) from the reference per token, nats; float64 [tokens].

    reference: log-probabilities, float32 [tokens, vocabulary], contiguous, on CPU; −inf where p = 0.
    logits: the candidate's, likewise; −inf where q = 0. A token with NaN or +inf in either, or without a logit above
        −inf, gets NaN.
    """
    for name, tensor in (("reference", reference), ("logits", logits)):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise AmqError(f"jensen_shannon: {name} must be float32 on cpu, got {tensor.dtype} on {tensor.device}")
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise AmqError(f"jensen_shannon: {name} must be [tokens, vocabulary], got {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise AmqError(
                f"jensen_shannon: {name} must be contiguous, got strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )
    if reference.shape != logits.shape:
        raise AmqError(
            f"jensen_shannon: reference and logits must have one shape, got {list(reference.shape)} and "
            f"{list(logits.shape)}"
        )
    return _jensen_shannon_rows(reference, logits)


def _jensen_shannon_rows(reference: Tensor, logits: Tensor, isa: str = "") -> Tensor:
    """The call itself; `isa` as for `_dequantize_rows`."""
    divergence = torch.empty(len(logits), dtype=torch.float64)
    cpu_module().jensen_shannon(
        reference=reference.data_ptr(),
        logits=logits.data_ptr(),
        divergence=divergence.data_ptr(),
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return divergence
