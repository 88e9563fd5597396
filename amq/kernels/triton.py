"""Launches the Triton kernels (`kernels/triton/`) on weights in the layout of `amq/kernels/gpu_layout.py`.

Up to four weights that share x go into one launch, each in its own format; more go into several. A call allocates its
output and nothing else and never waits for the GPU, so that it can be captured in a CUDA graph. Triton compiles at the
first use of each combination of formats, K, group size, dtypes and launch parameters, though not for each number of
rows above the gemv's: run a model once before capturing it.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors, where TRITON_INTERPRET=1 is set before Triton is
imported: for tests only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.packing import PackedWeight, PreparedWeight, check_fused

DTYPES = (torch.float16, torch.bfloat16)
MAX_WEIGHTS = 4
"""Weights in one launch."""
MAX_GEMV_ROWS = 16
"""Rows of x that one gemv can hold."""
DEQUANTIZE_ROWS = 32
"""Rows that one program of `dequantize` writes, a slab of each."""
DEQUANTIZE_BLOCK = (4, 512)
"""Rows and features that one program of `dequantize_rows` writes."""


@dataclass(frozen=True)
class Launch:
    """The parameters of one launch. They change speed, and slabs_per_step the order of the sums too.

    block_m: rows of x to a program of the gemm: 16, 32, 64 or 128; 0 takes the gemv, for at most 16 rows.
    block_n: output rows to a program. The gemv wants a multiple of 8 · num_warps / slabs_per_step: that many go to
        different threads, and each thread takes 1, 2, 4, … rows. The gemm wants one of 16 · num_warps / slabs_per_step.
    slabs_per_step: slabs of 512 input features at once: in the gemv a power of two up to 8 · num_warps; in the gemm
        num_warps, which then divide K among them, or 1, where they divide the output rows.
    num_warps, num_stages: Triton's. With more stages the gemm keeps x and the weights of a slab in shared memory.
    """

    block_m: int
    block_n: int
    slabs_per_step: int
    num_warps: int
    num_stages: int


Choose = Callable[[int, int, int, int], Launch]
"""(rows of x, out_features together, in_features, bits at most) → the parameters of a launch."""

DENSE_ROWS = 256
"""Rows of x from which `linear` dequantizes and lets torch multiply, where `benchmarks/gpu/tune.py` measured no other
number: on paper the dequantized weight then costs a quarter of the product's time, and less with every row more."""


def choose(rows: int, out_features: int, in_features: int, bits: int) -> Launch:
    """The launch parameters for x of `rows` rows and weights of at most `bits` bits, out_features together.

    Reasoned from compiled code, not measured. Per weight the gemv takes 3.3 to 5 instructions for one row of x and 2
    more for each further row, the gemm 5.3 for up to 16 rows; so two rows are where they meet. Up to 32 rows of x,
    warps divide K: a small weight has few rows. A large one takes more of them to a program, for x comes once to each.
    slabs_per_step depends on rows and in_features alone, so that fused and separate launches agree to the last bit.
    """
    if rows <= 2:
        slabs = _slabs_per_step(in_features, 8)
        return Launch(0, (4 if bits <= 4 else 2) * 8 // slabs, slabs, 1, 1)
    if rows <= 32:
        slabs = _slabs_per_step(in_features, 4)
        block_n = 32 if rows <= 16 and out_features >= 8192 else 16
        return Launch(16 if rows <= 16 else 32, block_n, slabs, slabs, 1)
    return Launch(64, 64, 1, 4, 1)


def measured(rows: int, out_features: int, in_features: int, bits: int) -> Launch:
    """What `benchmarks/gpu/tune.py` found fastest on this GPU, else what `choose` reasons."""
    found = tuning.look_up(tuning.triton_key(rows, in_features, bits))
    return Launch(*found) if found else choose(rows, out_features, in_features, bits)


def dense_rows() -> int:
    """Rows of x from which `linear` dequantizes: a number for the whole GPU, so that fused and separate calls agree."""
    return tuning.look_up(tuning.DENSE_KEY) or DENSE_ROWS


def _slabs_per_step(in_features: int, most: int) -> int:
    """The largest power of two, up to `most`, that computes at most an eighth of the slabs in vain."""
    slabs = -(-in_features // layout.SLAB)
    while most > 1 and -slabs % most > slabs // 8:
        most //= 2
    return most


def unsupported_reason(fmt: BitFormat) -> str | None:
    """None if these kernels run `fmt` on this machine, else the reason and the remedy."""
    if reason := layout.unsupported_reason(fmt):
        return reason
    try:
        _kernels()
    except AmqError as error:
        return str(error)
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return (
            "torch finds no GPU (torch.cuda.is_available() is False): install a driver and a torch that is built for "
            "it; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests"
        )
    return None


def linear(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    bias: Tensor | None = None,
    activations: str = "fp32",
    name: str = "linear",
    choose: Choose | None = None,
) -> Tensor:
    """y[M, ΣN] = x[M, K] · Wᵀ (+ bias) for every weight, side by side in the order of `weights`.

    x: float16 or bfloat16 [M, K], contiguous, on the device of the weights; y has its dtype. Sums are float32. In the
        gemv (`choose` says for how many rows) products are too; in the gemm weights are first rounded to x's dtype.
    weights: at least one, all with K input features and one group size; each in its own format.
    bias: float16, bfloat16 or float32 [ΣN], or None.
    activations: "fp32"; these kernels have no int8 mode.
    name: what to call this linear in errors.
    choose: the launch parameters; None takes `measured`, and from `dense_rows` rows on dequantizes each weight into a
        buffer that lives as long as the call, and multiplies with torch.
    Raises AmqError, and computes nothing, where these do not fit together or Triton cannot compile or launch.
    """
    _check(x, weights, bias, activations, name)
    if choose is None and x.shape[0] >= dense_rows():
        return _dense_linear(x, weights, bias)
    y = x.new_empty(x.shape[0], sum(w.out_features for w in weights))
    try:
        linear_into(y, x, weights, bias, choose or measured)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, _kernels().error) as error:
        formats = ", ".join(w.format.name for w in weights)
        raise AmqError(
            f"{name}: Triton cannot compile or launch {formats} for {len(x)} rows of {x.dtype} and {x.shape[1]} input "
            f"features on {x.device}: {error}; Triton needs a C compiler (CC), and --backend reference needs no Triton"
        ) from error
    return y


def _dense_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None) -> Tensor:
    """Each weight's product is one of its own, whatever stands beside it: fused and separate calls agree."""
    y = x.new_empty(x.shape[0], sum(w.out_features for w in weights))
    for weight, part in zip(weights, y.split([w.out_features for w in weights], dim=-1), strict=True):
        transposed = dequantize(weight, x.dtype).T
        if len(weights) == 1:
            torch.mm(x, transposed, out=y)
        else:
            part.copy_(torch.mm(x, transposed))
    return y if bias is None else y.add_(bias)


def linear_into(
    y: Tensor,
    x: Tensor,
    weights: Sequence[PreparedWeight],
    bias: Tensor | None = None,
    choose: Choose = choose,
) -> None:
    """`linear` without its checks, into y [M, ΣN]: contiguous, of any float dtype."""
    out_features = [w.out_features for w in weights]
    bits = max(w.format.bits for w in weights)
    launch = choose(x.shape[0], sum(out_features), x.shape[1], bits)
    with _on_device(x):
        for first in range(0, len(weights), MAX_WEIGHTS):
            start = sum(out_features[:first])
            some = slice(first, first + MAX_WEIGHTS)
            part = None if bias is None else bias[start:]
            _launch_weights(y[:, start:], x, weights[some], part, launch)


def dequantize(weight: PreparedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out_features, in_features] in `dtype` (a float), bit-equal to `amq.packing.dequantize`."""
    if reason := layout.unsupported_reason(weight.format):
        raise AmqError(f"dequantize {weight.format.name} with Triton: {reason}")
    _check_data([weight], weight.data.device, "dequantize")
    kernels = _kernels()
    out = weight.data.new_empty(weight.out_features, weight.in_features, dtype=dtype)
    blocks = -(-weight.out_features // DEQUANTIZE_ROWS) * -(-weight.in_features // layout.SLAB)
    with _on_device(out):
        if blocks:
            kernels.dequantize[(blocks,)](
                out,
                weight.data.view(torch.int32),
                weight.out_features,
                BITS=weight.format.bits,
                K=weight.in_features,
                GROUP_SIZE=weight.group_size,
                BLOCK_N=DEQUANTIZE_ROWS,
                num_warps=4,
            )
    return out


def dequantize_rows(packed: PackedWeight, out: Tensor) -> None:
    """Writes W into `out` [out_features, in_features], contiguous, of any float dtype: bit-equal to
    `amq.packing.dequantize`.

    packed: of a dense format, contiguous, on the device of `out`; nothing is prepared and nothing else allocated.
    """
    if reason := layout.unsupported_reason(packed.format):
        raise AmqError(f"dequantize {packed.format.name} with Triton: {reason}")
    kernels = _kernels()
    rows, in_features = out.shape
    block_n, block_k = DEQUANTIZE_BLOCK
    blocks = -(-rows // block_n) * -(-in_features // block_k)
    parts = [part.contiguous() for part in packed.parts.values()]
    with _on_device(out):
        if blocks:
            kernels.dequantize_rows[(blocks,)](
                out,
                *parts,
                rows,
                in_features,
                parts[0].shape[1],
                parts[1].shape[1],
                BITS=packed.format.bits,
                GROUP_SIZE=packed.group_size,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                num_warps=4,
            )


def _launch_weights(
    y: Tensor, x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, launch: Launch
) -> None:
    """One launch for up to MAX_WEIGHTS weights: writes the first ΣN columns of y [M, row stride of y]."""
    kernels = _kernels()
    shared = dict(
        BITS=tuple(w.format.bits for w in weights),
        K=x.shape[1],
        GROUP_SIZE=weights[0].group_size,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    blocks = sum(-(-w.out_features // launch.block_n) for w in weights)
    arguments = (y, bias, tuple(w.data.view(torch.int32) for w in weights), tuple(w.out_features for w in weights))
    if blocks == 0 or x.shape[0] == 0:
        return
    if launch.block_m == 0:
        lane_rows = 8 * launch.num_warps // launch.slabs_per_step
        if x.shape[0] > MAX_GEMV_ROWS or lane_rows == 0 or launch.block_n % lane_rows:
            raise AmqError(f"a gemv of {x.shape[0]} rows cannot take {launch}; its docstring says what each may be")
        shared |= dict(
            M=x.shape[0], SLABS=launch.slabs_per_step, LANE_ROWS=lane_rows, THREAD_ROWS=launch.block_n // lane_rows
        )
        kernels.gemv[(blocks,)](x, *arguments, y.stride(0), **shared)
        return
    row_warps = launch.num_warps // launch.slabs_per_step
    if launch.slabs_per_step not in (1, launch.num_warps) or launch.block_n % (16 * row_warps):
        raise AmqError(f"a gemm cannot take {launch}; its docstring says what each may be")
    blocks *= -(-x.shape[0] // launch.block_m)
    shared |= dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, WARPS=launch.num_warps, SLABS=launch.slabs_per_step)
    kernels.gemm[(blocks,)](x, *arguments, y.stride(0), x.shape[0], **shared)


@lru_cache(maxsize=1)
def _kernels() -> SimpleNamespace:
    """The kernels, imported at first use, whether they are interpreted, and the class of Triton's errors."""
    try:
        import triton
        from triton.errors import TritonError
    except ImportError as error:
        raise AmqError(f"the package triton cannot be imported ({error}): pip install triton") from error
    from amq._triton import dequantize, gemm, gemv

    return SimpleNamespace(
        gemv=gemv.gemv,
        gemm=gemm.gemm,
        dequantize=dequantize.dequantize,
        dequantize_rows=dequantize.dequantize_rows,
        interpreted=not isinstance(gemv.gemv, triton.JITFunction),
        error=TritonError,
    )


def _on_device(tensor: Tensor) -> torch.cuda.device | nullcontext:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str, name: str) -> None:
    check_fused(weights, ("in_features", "group_size"), name)
    if activations != "fp32":
        raise AmqError(f"{name}: the Triton kernels have activations fp32 only, got {activations!r}; use backend cuda")
    for weight in weights:
        if reason := layout.unsupported_reason(weight.format):
            raise AmqError(f"{name}: Triton cannot run {weight.format.name}: {reason}")
    in_features = weights[0].in_features
    if x.ndim != 2 or x.shape[1] != in_features or not x.is_contiguous():
        raise AmqError(
            f"{name}: x must be [rows, {in_features}] and contiguous, got {list(x.shape)} with strides "
            f"{list(x.stride())}; x.reshape(-1, {in_features}).contiguous() makes it so"
        )
    if x.dtype not in DTYPES:
        raise AmqError(f"{name}: x must be float16 or bfloat16, got {x.dtype}; convert it with x.to(torch.bfloat16)")
    _check_data(weights, x.device, name)
    out_features = sum(w.out_features for w in weights)
    if bias is not None and (
        tuple(bias.shape) != (out_features,)
        or bias.dtype not in (*DTYPES, torch.float32)
        or bias.device != x.device
        or not bias.is_contiguous()
    ):
        raise AmqError(
            f"{name}: bias must be float32, bfloat16 or float16 [{out_features}], contiguous, on {x.device}, "
            f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )


def _check_data(weights: Sequence[PreparedWeight], device: torch.device, name: str) -> None:
    """That every weight is data of the layout, on `device`, and that the kernels can reach it there."""
    for weight in weights:
        if weight.data.device != device:
            raise AmqError(f"{name}: x is on {device}, its weight on {weight.data.device}; move one of them")
        layout.check_data(weight, name)
        if weight.data.data_ptr() % 16:
            raise AmqError(f"{name}: a weight's data must start at a multiple of 16 bytes; copy it with data.clone()")
    on_gpu = not _kernels().interpreted
    if on_gpu != (device.type == "cuda"):
        wanted = "a GPU" if on_gpu else "the CPU (TRITON_INTERPRET is set)"
        raise AmqError(f"{name}: the Triton kernels run on {wanted}, but the tensors are on {device}; move them")
