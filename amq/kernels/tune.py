"""Measures launch parameters on this machine's GPU and writes them where `amq.kernels.launch_table` finds them.

    python -m amq.kernels.tune [--in-features 4096,14336] [--rows 1,2,4,16,64,512] [--formats int2,int3,int4]

About a minute for the defaults, most of it compiling. Each candidate multiplies weights that are cold in the L2 cache
(a rotation of copies larger than it), many calls in one CUDA graph; the median of several replays counts. A candidate
that does not fit the GPU (shared memory, registers, memory) is left out with a warning that names it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from datetime import date
from importlib.metadata import version

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, check_group_size, get_format
from amq.kernels import cuda, triton
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.packing import PreparedWeight

DEVICE = "cuda"
OUT_FEATURES = 4096
REPLAYS = 7
LAUNCHES = 20
"""Of one graph."""
DENSE_ROWS = (32, 64, 128, 256, 512)
L2_TIMES = 3
"""The rotation takes at least so many times the L2 cache."""

log = logging.getLogger(__name__)

Product = Callable[[Tensor, PreparedWeight], Tensor]


def random_weight(fmt: BitFormat, out_features: int, in_features: int, group_size: int) -> PreparedWeight:
    """Random bytes as codes, scales near 0.01 and zero points near the middle: valid, made in no time, on the GPU."""
    sizes = layout.layout_of(fmt, out_features, in_features, group_size)
    data = torch.randint(0, 256, (sizes.nbytes,), dtype=torch.uint8, device=DEVICE)
    pairs = data[sizes.code_bytes : sizes.code_bytes + sizes.scale_bytes].view(torch.float16).view(-1, 2)
    pairs[:, 0] = 0.01
    pairs[:, 1] = fmt.levels / 2
    return PreparedWeight("cuda", fmt, out_features, in_features, group_size, data)


def microseconds(product: Product, x: Tensor, weights: Sequence[PreparedWeight]) -> float:
    """The median time of one product, cold: `weights` are copies to rotate through."""
    for weight in weights[:2]:
        product(x, weight)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(LAUNCHES):
            product(x, weights[call % len(weights)])
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def best(
    key: str, candidates: dict[str, tuple[object, Product]], x: Tensor, weights: list[PreparedWeight]
) -> dict | None:
    """The entry of the fastest candidate, {label: (parameters, product)}; None where none of them runs."""
    tried = {}
    for label, (_, product) in candidates.items():
        try:
            tried[label] = microseconds(product, x, weights)
        except (AmqError, RuntimeError) as error:  # out of memory, and what Triton and CUDA raise
            log.warning("%s: %s is left out: %s", key, label, error)
    if not tried:
        return None
    fastest = min(tried, key=tried.get)
    print(f"{key}: {fastest} {tried[fastest]:.1f} µs of {len(tried)} tried", flush=True)
    rounded = {label: round(time, 2) for label, time in tried.items()}
    return {"parameters": candidates[fastest][0], "microseconds": rounded[fastest], "tried": rounded}


def cuda_candidates(in_features: int) -> dict[str, tuple[object, Product]]:
    slabs = -(-in_features // layout.SLAB)

    def product(warps: int) -> Product:
        def run(x: Tensor, weight: PreparedWeight) -> Tensor:
            stream = torch.cuda.current_stream().cuda_stream
            return cuda.library().linear(x, [weight], None, "fp32", stream, warps)

        return run

    return {f"warps {n}": (n, product(n)) for n in (1, 2, 4, cuda.MAX_WARPS) if n <= slabs}


def triton_candidates(rows: int, in_features: int, bits: int) -> dict[str, tuple[object, Product]]:
    """Variations of the launch that was reasoned out on paper, which is the first; all sum in its order."""
    paper = triton.choose(rows, OUT_FEATURES, in_features, bits)
    launches = [paper, replace(paper, block_n=2 * paper.block_n)]
    if paper.block_m == 0:
        launches += [replace(paper, block_n=paper.block_n // 2), replace(paper, block_n=4 * paper.block_n)]
    else:
        launches += [replace(paper, num_stages=stages) for stages in (2, 3)]

    def product(launch: triton.Launch) -> Product:
        return lambda x, weight: triton.linear(x, [weight], choose=lambda *_: launch)

    return {str(launch): (list(astuple(launch)), product(launch)) for launch in launches if launch.block_n}


def dense_rows(weights: list[PreparedWeight]) -> dict:
    """The entry of tuning.DENSE_KEY: the fewest rows of DENSE_ROWS from which the dense product wins for good."""
    in_features = weights[0].in_features
    tried, fewest = {}, 2 * DENSE_ROWS[-1]
    for rows in reversed(DENSE_ROWS):
        x = torch.randn(rows, in_features, dtype=torch.float16, device=DEVICE)
        gemm = microseconds(lambda x, weight: triton.linear(x, [weight], choose=triton.measured), x, weights)
        dense = microseconds(lambda x, weight: x @ triton.dequantize(weight, x.dtype).T, x, weights)
        tried[str(rows)] = [round(gemm, 2), round(dense, 2)]
        if dense >= gemm:
            break
        fewest = rows
    print(f"{tuning.DENSE_KEY}: {fewest}; rows: [gemm µs, dense µs] {tried}", flush=True)
    return {"parameters": fewest, "tried": tried}


def tune(
    in_features: Sequence[int], rows: Sequence[int], formats: Sequence[BitFormat], group_size: int
) -> dict[str, dict]:
    """{key: entry} for `tuning.save`."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    entries = {}
    for features in in_features:
        for fmt in formats:
            size = layout.layout_of(fmt, OUT_FEATURES, features, group_size).nbytes
            weights = [random_weight(fmt, OUT_FEATURES, features, group_size) for _ in range(-(-L2_TIMES * l2 // size))]
            for count in rows:
                x = torch.randn(count, features, dtype=torch.float16, device=DEVICE)
                bits = fmt.bits
                key = tuning.triton_key(count, features, bits)
                entries[key] = best(key, triton_candidates(count, features, bits), x, weights)
            if fmt == formats[0] and cuda.unsupported_reason(fmt) is None:
                key, x = tuning.cuda_key(features), torch.randn(1, features, dtype=torch.float16, device=DEVICE)
                entries[key] = best(key, cuda_candidates(features), x, weights)
    entries[tuning.DENSE_KEY] = dense_rows(weights)
    return {key: entry for key, entry in entries.items() if entry is not None}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m amq.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--in-features", default="4096,11008,14336", help="of the linears to tune for")
    parser.add_argument("--rows", default="1,2,4,16,64,512")
    parser.add_argument("--formats", default="int2,int3,int4")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args(argv)
    formats = [get_format(name) for name in arguments.formats.split(",")]
    for fmt in formats:
        if reason := triton.unsupported_reason(fmt):
            raise AmqError(f"nothing to tune: Triton cannot run {fmt.name}: {reason}")
    numbers = [[int(n) for n in text.split(",")] for text in (arguments.in_features, arguments.rows)]
    entries = tune(*numbers, formats, check_group_size(arguments.group_size))
    versions = {"torch": torch.__version__, "triton": version("triton"), "date": date.today().isoformat()}
    print(f"{len(entries)} entries in {tuning.save(torch.cuda.get_device_name(), entries, versions)}")
    return 0


if __name__ == "__main__":
    from amq.util.settings import run_command

    sys.exit(run_command(main, sys.argv[1:]))
