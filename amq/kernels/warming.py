"""Compiles what a model's linears can ask of Triton when it is loaded, instead of in the middle of somebody's answer.

A kernel is compiled for all widths that the model has at one number of input features, so that their number does not
depend on which linears are fused, nor in which order: for each number of input features one kernel for each class of
rows, and for each format one that dequantizes and one that looks rows up. Triton keeps what it compiled on disk;
another process only loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any

import torch
from torch import nn

from amq.errors import AmqError
from amq.kernels import cuda, triton
from amq.kernels.backends import current
from amq.kernels.compilations import compilations, prime
from amq.kernels.embedding import StoredEmbedding
from amq.kernels.launch_table import ROWS_CLASSES
from amq.kernels.modules import QuantizedLinear, StoredLinear
from amq.packing import PreparedWeight
from amq.util.limits import processors
from amq.util.progress import Progress, terminal_progress

PATIENCE = 1.0
"""Seconds of compiling from which it is shown."""
GPU_BACKENDS = ("cuda", "triton")
FIRST_ROWS = (1, *(most + 1 for most in ROWS_CLASSES))
"""The fewest rows of each class."""


def warm(
    groups: Iterable[Sequence[PreparedWeight]],
    dtype: torch.dtype,
    most_rows: int,
    bias: torch.dtype | None = None,
    looked_up: Sequence[PreparedWeight] = (),
    progress: Progress | None = None,
    out: torch.dtype | None = None,
) -> int:
    """Compiles every Triton kernel that products of `groups` can take, and returns how many were not in memory yet.

    groups: weights that share x, as they are multiplied; those of other backends than cuda and triton are left out.
    dtype: of x, float16 or bfloat16. most_rows: of x in one call.
    bias, out: the dtypes of biases and of y where they are not that of x.
    looked_up: weights whose rows are read too, in `dtype`: those of embeddings.
    progress: where it is shown when it takes more than PATIENCE seconds; None takes the terminal's.
    Raises AmqError where a kernel cannot be compiled.
    """
    by_device: dict[torch.device, list[PreparedWeight]] = {}
    for group in groups:
        for weight in group:
            if weight.backend in GPU_BACKENDS:
                by_device.setdefault(weight.data.device, []).append(weight)
    before = compilations.count
    for device, weights in by_device.items():
        with current(device):
            lookups = [w for w in looked_up if w.backend in GPU_BACKENDS and w.data.device == device]
            calls = [*kernel_calls(weights, dtype, most_rows, bias, out), *lookup_calls(lookups, dtype)]
            if not triton.interpreted():
                _compile(calls, device, progress or terminal_progress())
        compilations.warm_devices.add(device)
    return compilations.count - before


def warm_model(model: nn.Module, dtype: torch.dtype, most_rows: int, progress: Progress | None = None) -> int:
    """`warm` for the linears of `model` that are on a GPU, which are prepared there now, and for embeddings that share
    a weight with one of them."""
    weights: dict[QuantizedLinear, PreparedWeight] = {}
    for module in model.modules() if dtype in triton.DTYPES else ():
        if isinstance(module, QuantizedLinear):
            place = module.place if isinstance(module, StoredLinear) else module.data.device
            if place.type == "cuda":
                weights[module] = module.prepared(place)
    heads = [m.head for m in model.modules() if isinstance(m, StoredEmbedding)]
    looked_up = [weights[head] for head in heads if head is not None and head in weights]
    biases = {m.bias.dtype for m in weights if m.bias is not None} - {dtype}
    groups = [[weight] for weight in weights.values()]
    return sum(warm(groups, dtype, most_rows, bias, looked_up, progress) for bias in (None, *biases))


def kernel_calls(
    weights: Sequence[PreparedWeight],
    dtype: torch.dtype,
    most_rows: int,
    bias: torch.dtype | None = None,
    out: torch.dtype | None = None,
) -> list[triton.Call]:
    """A call of each kernel that products of `weights` can take, all on one device. Which widths go together is noted,
    so that later products take the same kernels."""
    by_shape: dict[tuple[int, int], list[PreparedWeight]] = {}
    for weight in weights:
        by_shape.setdefault((weight.in_features, weight.group_size), []).append(weight)
    dense, calls = triton.dense_rows(), []
    for some in by_shape.values():
        of_width = {w.format.bits: w for w in some if w.out_features}
        fewest = min(_fewest_rows(weight) for weight in some)
        classes = zip(FIRST_ROWS, (*ROWS_CLASSES, most_rows), strict=True)
        rows = [first for first, last in classes if first <= min(most_rows, dense - 1) and last >= fewest]
        for widths in compilations.join(some[0].in_features, some[0].group_size, of_width):
            examples = [of_width[bits] for bits in widths]
            calls += [_example(examples, first, dtype, bias, out) for first in rows]
    if most_rows >= dense:
        kinds = {(w.format.bits, w.group_size, w.in_features % triton.ALIGNMENT == 0): w for w in weights}
        calls += [triton.dequantize_call(w.data.new_empty(0, dtype=dtype), w) for w in kinds.values()]
    return calls


def lookup_calls(weights: Sequence[PreparedWeight], dtype: torch.dtype) -> list[triton.Call]:
    """A call for each of `weights`, whose rows are read."""
    empty = ((w, w.data.new_empty(0, dtype=dtype), w.data.new_empty(0, dtype=torch.int64)) for w in weights)
    return [triton.dequantize_call(out, weight, ids) for weight, out, ids in empty]


def _example(
    weights: Sequence[PreparedWeight],
    rows: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    out: torch.dtype | None,
) -> triton.Call:
    """The first launch of a product. One element of x and y is enough: a kernel does not depend on where they are."""
    x, y, added = (weights[0].data.new_empty(1, dtype=kind) for kind in (dtype, out or dtype, bias or dtype))
    x, y = x.expand(rows, weights[0].in_features), y.expand(rows, sum(w.out_features for w in weights))
    return triton.linear_calls(y, x, weights, added, triton.measured)[0]


def _fewest_rows(weight: PreparedWeight) -> int:
    """Rows of x from which Triton multiplies with it."""
    return cuda.max_rows() + 1 if weight.backend == "cuda" else 1


def _compile(calls: Sequence[triton.Call], device: torch.device, progress: Progress) -> None:
    """Compiles the kernels of `calls` side by side, within the processors that there are, and loads them onto the GPU:
    loading waits for it, which a capture does not allow."""
    for call in calls:
        prime(call.kernel)

    def compiled(call: triton.Call) -> Any:
        with current(device):  # which is each thread's own
            return call.kernel.warmup(*call.arguments, grid=(1,), **call.options)

    with ThreadPoolExecutor(max(1, min(processors(), len(calls)))) as pool:
        futures = [pool.submit(compiled, call) for call in calls]
        try:
            done, left = wait(futures, PATIENCE)
            if left:
                with progress.stage("compiling kernels", len(futures)) as step:
                    for _ in done:
                        step()
                    for _ in as_completed(left):
                        step()
            kernels = [future.result() for future in futures]
        except triton.errors() as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise AmqError(f"Triton cannot compile for {device}: {error}; {triton.REMEDY}") from error
    if device.type == "cuda":
        for kernel in kernels:
            kernel._init_handles()
