"""Bindings of the compiled CPU kernels (`amq._cpu`): typed arguments in; addresses, lengths and strides out.

`dequantize_into` writes `(codes − zero_point) · scale` as float32, bit-equal to `amq.packing.dequantize` and near the
speed at which memory can be written. It is there to fill one preallocated weight again and again while formats are
tried. For another dtype or device it computes the reference and copies it: that route is the specification, chosen by
the caller's `out`, not a fallback; GPU kernels have bindings of their own.

`jensen_shannon` is `amq.model.losses.jensen_shannon` after `log_softmax`, fused: the candidate's logits are read
twice, the reference once, and nothing of their size is written.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.packing import PackedWeight, PreparedWeight, check_fused, dequantize
from amq.util.native import NO_MEMORY as NO_MEMORY
from amq.util.native import cpu_module as cpu_module
from amq.util.native import memory as memory


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
        out.copy_(dequantize(packed.to(out.device)))
        return
    _check_packed(packed, "dequantize")
    _dequantize_rows(packed, out)


def dequantized(packed: PackedWeight) -> Tensor:
    """A new float32 tensor [out_features, in_features] on the CPU that holds the dequantized weight."""
    out = torch.empty(packed.out_features, packed.in_features)
    dequantize_into(packed, out)
    return out


def _check_packed(packed: PackedWeight, what: str) -> None:
    for field, tensor in packed.parts.items():
        if tensor.device.type != "cpu":
            raise AmqError(f"{what} {packed.format.name}: {field} must be on cpu, got {tensor.device}")
        if not tensor.is_contiguous():
            raise AmqError(
                f"{what} {packed.format.name}: {field} must be contiguous, got strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )
    check_compiled(packed.format)


def check_compiled(fmt: BitFormat) -> None:
    """Raises AmqError where `amq._cpu` is missing or was built from another record of this format."""
    compiled = cpu_module().formats()
    if compiled.get(fmt.name) != [fmt.levels, fmt.unit_codes, fmt.unit_bytes]:
        raise AmqError(
            f"format {fmt.name} with {fmt.levels} levels, {fmt.unit_codes} codes in {fmt.unit_bytes} bytes is not "
            f"compiled into amq._cpu, which has {compiled}; rebuild it with `pip install -e .`"
        )


def _dequantize_rows(packed: PackedWeight, out: Tensor, isa: str = "") -> None:
    """The call itself; `isa` forces one of `cpu_module().isas()`, the empty string means the best."""
    cpu_module().dequantize(
        **_packed_arguments(packed), out=memory(out), out_stride=out.shape[1], isa=isa, rotated=packed.rotation > 0
    )


def _packed_arguments(packed: PackedWeight) -> dict[str, Any]:
    """What the module's functions that read packed rows have in common."""
    return {
        "format": packed.format.name,
        **{part: memory(tensor) for part, tensor in packed.parts.items()},
        "qweight_stride": packed.qweight.shape[1],
        "group_stride": packed.scale.shape[1],
        "rows": packed.out_features,
        "in_features": packed.in_features,
        "group_size": packed.group_size,
        "threads": torch.get_num_threads(),
    }


HUGE_PAGE = 2 << 20


def empty_bytes(count: int) -> Tensor:
    """uint8 [count], on pages of 2 MiB as far as it fills them and the system has them.

    Weights so placed are read 10 to 15 % faster (csrc/cpu/linear_body.h). The memory is mapped afresh, because memory
    that was used before keeps its small pages; up to 2 MiB more are reserved and never touched.
    """
    if count < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    mapping = mmap.mmap(-1, count + HUGE_PAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    with suppress(OSError):  # advice: a kernel without large pages refuses it, and the memory is as good as any
        mapping.madvise(mmap.MADV_HUGEPAGE, start, count // HUGE_PAGE * HUGE_PAGE)
    return memory[start : start + count]


def prepared_bytes(fmt: BitFormat, out_features: int, in_features: int, group_size: int) -> int:
    """Bytes of a prepared weight of this shape."""
    return cpu_module().prepared_bytes(fmt.name, out_features, in_features, group_size)


def prepare(packed: PackedWeight, out: Tensor | None = None) -> Tensor:
    """The tiles of csrc/cpu/tiles.h: uint8, one dimension; of the packed size where 32 divides in_features.

    out: where they go, contiguous and of `prepared_bytes`; None: memory of their own.
    """
    _check_packed(packed, "prepare")
    if out is None:
        out = empty_bytes(prepared_bytes(packed.format, packed.out_features, packed.in_features, packed.group_size))
    cpu_module().prepare(**_packed_arguments(packed), out=memory(out))
    return out


def linear(
    x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str, isa: str = ""
) -> Tensor:
    """y [M, ΣN] = x [M, K] · Wᵀ + bias for weights that `prepare` made; float32, contiguous, on CPU.

    x: where the weights are rotated, it is rotated on its way in, before int8 rounds it.
    activations: `fp32` or `int8`, as in `amq.kernels.ops.linear`, which checks what it is given; the module checks
        the sizes.
    isa: one of `cpu_module().isas()`; the empty string means AMQ_CPU_ISA or the best.
    Raises AmqError where a weight has not the bytes of its shape, the bias not those of all columns, or where weights
    are not rotated alike.
    """
    rows, in_features = x.shape
    parts = [(w.format.name, *memory(w.data), w.out_features) for w in weights]
    columns = sum(w.out_features for w in weights)
    y = torch.empty(rows, columns)
    try:
        cpu_module().linear(
            parts, memory(x), NO_MEMORY if bias is None else memory(bias), memory(y), rows, in_features,
            weights[0].group_size, in_features, columns, activations == "int8", torch.get_num_threads(), isa,
            _rotated(weights),
        )  # fmt: skip
    except ValueError as error:
        raise AmqError(f"linear of {in_features} features in {columns} columns: {error}") from error
    return y


def grouped_linear(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    sizes: Sequence[int],
    biases: Sequence[Tensor | None],
    activations: str,
    isa: str = "",
) -> Tensor:
    """y [M, N]: weight i times its `sizes[i]` rows of x [M, K], one after another, in one call; float32 on CPU.

    weights, of one shape, N × K, and group size, each in its own format, as `linear` takes them. biases: [N] each,
    float32 and contiguous. Raises AmqError where a weight has not the bytes of its shape.
    """
    rows, in_features = x.shape
    columns = weights[0].out_features
    parts = [(w.format.name, *memory(w.data), w.out_features) for w in weights]
    given = any(bias is not None for bias in biases)
    vectors = [NO_MEMORY if bias is None else memory(bias) for bias in biases] if given else []
    y = torch.empty(rows, columns)
    try:
        cpu_module().linear_grouped(
            parts, list(sizes), memory(x), vectors, memory(y), in_features, weights[0].group_size,
            activations == "int8", torch.get_num_threads(), isa, _rotated(weights),
        )  # fmt: skip
    except ValueError as error:
        raise AmqError(f"linears of {in_features} features in {columns} columns: {error}") from error
    return y


def linear_each(x: Tensor, weights: Sequence[PreparedWeight], activations: str, isa: str = "") -> Tensor:
    """One native call per weight without Python in between; y [M, N] of the last. All weights have one shape.

    What an engine that keeps its linears in C++ pays for each of them, for benchmarks.
    """
    rows, in_features = x.shape
    parts = [(w.format.name, *memory(w.data), w.out_features) for w in weights]
    y = torch.empty(rows, weights[0].out_features)
    cpu_module().linear_each(
        parts, memory(x), memory(y), rows, in_features, weights[0].group_size, y.shape[1],
        activations == "int8", torch.get_num_threads(), isa, _rotated(weights),
    )  # fmt: skip
    return y


def _rotated(weights: Sequence[PreparedWeight]) -> bool:
    """What the module is told of all weights of a call."""
    check_fused(weights, ("rotation",), "linear")
    return weights[0].rotation > 0


def read_seconds(tensor: Tensor) -> float:
    """How long it takes to read all of a contiguous CPU tensor with torch's threads: the shortest of several plain
    loops, which fetch ahead by different distances."""
    module, threads, found = cpu_module(), torch.get_num_threads(), []
    for ahead in module.READ_AHEADS:
        start = time.perf_counter()
        module.read_bytes(memory(tensor), threads, ahead)
        found.append(time.perf_counter() - start)
    return min(found)


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
        reference=memory(reference),
        logits=memory(logits),
        divergence=memory(divergence),
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return divergence
