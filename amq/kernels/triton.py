"""Launches the Triton kernels (`kernels/triton/`) on weights in the layout of `amq/kernels/gpu_layout.py`.

Up to four weights that share x go into one launch, each in its own format; more go into several. A call allocates its
output and nothing else and never waits for the GPU, so that it can be captured in a CUDA graph.

Triton compiles a kernel at its first launch, seconds of a processor each. What it compiles for is K, the group size,
x's dtype, the launch parameters and the set of widths that a kernel can read; not how many weights there are, in which
order, of which sizes, nor (above one) how many rows x has. `amq.kernels.warming.warm` compiles all of a model at load,
each kernel for all widths that the model has at that K: four kernels for each K, and one more for each format.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors, where TRITON_INTERPRET=1 is set before Triton is
imported: for tests only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.kernels.compilations import compilations
from amq.packing import PackedWeight, PreparedWeight, check_fused
from amq.util.files import cache_dir

DTYPES = (torch.float16, torch.bfloat16)
MAX_WEIGHTS = 4
"""Weights in one launch."""
MAX_GEMV_ROWS = 16
"""Rows of x that one gemv can hold."""
ALIGNMENT = 16
"""Bytes: Triton compiles another kernel for an x that does not begin at a multiple of them."""
DEQUANTIZE_ROWS, LOOKUP_ROWS = 32, 8
"""Rows that one program writes, a slab of each: of `dequantize`, with four warps, and of `rows`, with one."""
DEQUANTIZE_BLOCK = (4, 512)
"""Rows and features that one program of `dequantize_rows` writes."""
CACHE = "TRITON_CACHE_DIR"
CACHES = (CACHE, "TRITON_HOME")
"""Variables that say where Triton keeps what it has compiled."""

REMEDY = f"Triton needs a C compiler (CC) and a folder to write to ({CACHE}), and --backend reference needs no Triton"

log = logging.getLogger(__name__)


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


Choose = Callable[[int, int, int], Launch]
"""(rows of x, in_features, bits at most) → the parameters of a launch."""

DENSE_ROWS = 256
"""Rows of x from which `linear` dequantizes and lets torch multiply, where `benchmarks/gpu/tune.py` measured no other
number: on paper the dequantized weight then costs a quarter of the product's time, and less with every row more. At 16
rows the gemm waits for its weights alone, and to write and read them in 16 bits besides is nine times as much memory:
no time that the compiler saves is worth that."""


def choose(rows: int, in_features: int, bits: int) -> Launch:
    """The launch parameters for x of `rows` rows and weights of at most `bits` bits: the same ones for all rows of a
    class (`launch_table.ROWS_CLASSES`).

    Reasoned from compiled code, not measured. Per weight the gemv takes 3.3 to 5 instructions for one row of x and 2
    more for each further row, the gemm 5 for up to 16 rows; so from two rows on the gemm takes no more. Up to 32 rows
    of x, warps divide K: a small weight has few rows. Twice the rows of the weight to a program halve what comes
    through the L2 cache of x, which at 16 rows is more than the weights; at 32 they would take too many registers.
    slabs_per_step depends on rows and in_features alone, so that fused and separate launches agree to the last bit.
    """
    if rows <= 1:
        slabs = _slabs_per_step(in_features, 8)
        return Launch(0, (4 if bits <= 4 else 2) * 8 // slabs, slabs, 1, 1)
    if rows <= 32:
        slabs = _slabs_per_step(in_features, 4)
        return Launch(16, 32, slabs, slabs, 1) if rows <= 16 else Launch(32, 16, slabs, slabs, 1)
    return Launch(64, 64, 1, 4, 1)


def measured(rows: int, in_features: int, bits: int) -> Launch:
    """What `benchmarks/gpu/tune.py` found fastest on this GPU, else what `choose` reasons."""
    found = tuning.look_up(tuning.triton_key(rows, in_features, bits))
    return Launch(*found) if found else choose(rows, in_features, bits)


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
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    try:
        with _on_device(x):
            if choose is None and x.shape[0] >= dense_rows():
                return _dense_linear(x, weights, bias)
            y = x.new_empty(x.shape[0], sum(w.out_features for w in weights))
            linear_into(y, x, weights, bias, choose or measured)
            return y
    except torch.OutOfMemoryError:
        raise
    except errors() as error:
        formats = ", ".join(w.format.name for w in weights)
        raise AmqError(
            f"{name}: Triton cannot compile or launch {formats} for {len(x)} rows of {x.dtype} and {x.shape[1]} input "
            f"features on {x.device}: {error}; {REMEDY}"
        ) from error


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
    """`linear` without its checks, into y [M, ΣN]: contiguous, of any float dtype; x aligned to ALIGNMENT."""
    with _on_device(x):
        for call in linear_calls(y, x, weights, bias, choose):
            _launch(call, x.shape[0], x)


class Call(NamedTuple):
    """A launch that is ready: of `blocks` programs of `kernel`, with these arguments."""

    kernel: Any
    blocks: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def linear_calls(
    y: Tensor, x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, choose: Choose
) -> list[Call]:
    """The launches of `linear_into`, none where there is nothing to compute."""
    widths = compilations.widths(x.shape[1], weights[0].group_size, (w.format.bits for w in weights))
    launch = choose(x.shape[0], x.shape[1], widths[-1])
    calls, column = [], 0
    for first in range(0, len(weights), MAX_WEIGHTS):
        some = weights[first : first + MAX_WEIGHTS]
        if x.shape[0] and any(w.out_features for w in some):
            calls.append(_weights_call(y, x, some, bias, column, widths, launch))
        column += sum(w.out_features for w in some)
    return calls


def dequantize(weight: PreparedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out_features, in_features] in `dtype` (a float), bit-equal to `amq.packing.dequantize`."""
    _check_prepared(weight, "dequantize")
    out = weight.data.new_empty(weight.out_features, weight.in_features, dtype=dtype)
    with _on_device(out):
        _launch(dequantize_call(out, weight), len(out), out)
    return out


def rows(weight: PreparedWeight, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (int64 [n], on the weight's device) of W, [n, in_features]: bit-equal to those of `dequantize`.

    An id that is no row of W gives NaN, and nothing outside W is read: the GPU is not asked.
    """
    _check_prepared(weight, "rows")
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.device != weight.data.device:
        raise AmqError(
            f"rows: ids must be int64 of one dimension on {weight.data.device}, got {ids.dtype} {list(ids.shape)} on "
            f"{ids.device}"
        )
    out = weight.data.new_empty(len(ids), weight.in_features, dtype=dtype)
    with _on_device(out):
        _launch(dequantize_call(out, weight, ids.contiguous()), len(out), out)
    return out


def dequantize_rows(packed: PackedWeight, out: Tensor) -> None:
    """Writes W into `out` [out_features, in_features], contiguous, of any float dtype: bit-equal to
    `amq.packing.dequantize`, but for a rotated weight, which is written as it is stored.

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


def dequantize_call(out: Tensor, weight: PreparedWeight, ids: Tensor | None = None) -> Call:
    """The launch that writes W, or its rows `ids`, into out."""
    size = layout.layout_of(weight.format, weight.out_features, weight.in_features, weight.group_size)
    block_n, warps = (DEQUANTIZE_ROWS, 4) if ids is None else (LOOKUP_ROWS, 1)
    arguments = (out, weight.data.view(torch.int32), ids, weight.out_features, len(out), weight.in_features)
    options = dict(BITS=size.bits, GROUP_SIZE=weight.group_size, BLOCK_N=block_n, num_warps=warps)
    blocks = -(-len(out) // block_n) * size.slabs if weight.out_features else 0
    return Call(_kernels().dequantize, blocks, (*arguments, size.planes, size.slabs), options)


def _weights_call(
    y: Tensor,
    x: Tensor,
    weights: Sequence[PreparedWeight],
    bias: Tensor | None,
    column: int,
    widths: tuple[int, ...],
    launch: Launch,
) -> Call:
    """One launch for up to MAX_WEIGHTS weights, the columns of y from `column` on.

    It always has MAX_WEIGHTS weights, those that are not there without rows, and a bias, if only x for a pointer: their
    number and whether there is a bias would else make other kernels.
    """
    missing = MAX_WEIGHTS - len(weights)
    arguments = (
        *(x, y, x if bias is None else bias),
        tuple(w.data.view(torch.int32) for w in (*weights, *[weights[0]] * missing)),
        (*(w.out_features for w in weights), *missing * (0,)),
        (*(w.format.bits for w in weights), *missing * widths[:1]),
        *(column, int(bias is not None), y.stride(0)),
    )
    options: dict[str, Any] = dict(WIDTHS=widths, K=x.shape[1], GROUP_SIZE=weights[0].group_size)
    options |= dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    blocks = sum(-(-w.out_features // launch.block_n) for w in weights)
    if launch.block_m == 0:
        lane_rows = 8 * launch.num_warps // launch.slabs_per_step
        if x.shape[0] > MAX_GEMV_ROWS or lane_rows == 0 or launch.block_n % lane_rows:
            raise AmqError(f"a gemv of {x.shape[0]} rows cannot take {launch}; its docstring says what each may be")
        options |= dict(
            M=x.shape[0], SLABS=launch.slabs_per_step, LANE_ROWS=lane_rows, THREAD_ROWS=launch.block_n // lane_rows
        )
        return Call(_kernels().gemv, blocks, arguments, options)
    row_warps = launch.num_warps // launch.slabs_per_step
    if launch.slabs_per_step not in (1, launch.num_warps) or launch.block_n % (16 * row_warps):
        raise AmqError(f"a gemm cannot take {launch}; its docstring says what each may be")
    options |= dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, WARPS=launch.num_warps, SLABS=launch.slabs_per_step)
    blocks *= -(-x.shape[0] // launch.block_m)
    return Call(_kernels().gemm, blocks, (*arguments, x.shape[0]), options)


def _launch(call: Call, rows: int, on: Tensor) -> None:
    """Runs `call`, and says so where Triton had to compile on a device whose kernels were compiled at load."""
    if not call.blocks:
        return
    before = compilations.count
    call.kernel[(call.blocks,)](*call.arguments, **call.options)
    if compilations.count != before and on.device in compilations.warm_devices:
        shape = {name: call.options[name] for name in ("WIDTHS", "BITS", "K", "GROUP_SIZE") if name in call.options}
        log.warning(
            "Triton compiled a kernel while the model was in use, which takes seconds: for %d rows of %s, %s; "
            "warm() compiles what a model needs when it is loaded",
            *(rows, on.dtype, ", ".join(f"{name} {value}" for name, value in shape.items())),
        )


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, where nothing is compiled."""
    return bool(_kernels().interpreted)


def errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile or launch."""
    return RuntimeError, OSError, _kernels().error


@lru_cache(maxsize=1)
def _kernels() -> SimpleNamespace:
    """The kernels, imported at first use: gemv, gemm, dequantize, whether they are interpreted, and the class of
    Triton's errors. What they compile to is kept in our cache, unless the environment says where."""
    if not any(name in os.environ for name in CACHES):
        os.environ[CACHE] = str(cache_dir() / "triton")
    try:
        import triton
        from triton.errors import TritonError
    except ImportError as error:
        raise AmqError(f"the package triton cannot be imported ({error}): pip install triton") from error
    from amq._triton import dequantize, gemm, gemv

    interpreted = not isinstance(gemv.gemv, triton.JITFunction)
    if not interpreted:
        compilations.watch((gemv.gemv, gemm.gemm, dequantize.dequantize))
    return SimpleNamespace(
        gemv=gemv.gemv,
        gemm=gemm.gemm,
        dequantize=dequantize.dequantize,
        dequantize_rows=dequantize.dequantize_rows,
        interpreted=interpreted,
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


def _check_prepared(weight: PreparedWeight, name: str) -> None:
    if reason := layout.unsupported_reason(weight.format):
        raise AmqError(f"{name} {weight.format.name} with Triton: {reason}")
    _check_data([weight], weight.data.device, name)


def _check_data(weights: Sequence[PreparedWeight], device: torch.device, name: str) -> None:
    """That every weight is data of the layout, on `device`, and that the kernels can reach it there."""
    for weight in weights:
        if weight.data.device != device:
            raise AmqError(f"{name}: x is on {device}, its weight on {weight.data.device}; move one of them")
        layout.check_data(weight, name)
        if weight.data.data_ptr() % ALIGNMENT:
            raise AmqError(f"{name}: a weight's data must start at a multiple of 16 bytes; copy it with data.clone()")
    on_gpu = not _kernels().interpreted
    if on_gpu != (device.type == "cuda"):
        wanted = "a GPU" if on_gpu else "the CPU (TRITON_INTERPRET is set)"
        raise AmqError(f"{name}: the Triton kernels run on {wanted}, but the tensors are on {device}; move them")
