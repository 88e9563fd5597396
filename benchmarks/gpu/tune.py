"""Measures launch parameters on this machine's GPU and writes them where `amq.kernels.launch_table` finds them.

    python benchmarks/gpu/tune.py [--in-features 4096,14336] [--rows 1,16,32,128] [--formats LIST] [--smoke]

About a minute for the defaults, most of it compiling. Candidates are timed as the GPU suite times (common.py): weights
cold in the L2 cache, many calls in one CUDA graph, the median of its replays. A candidate that does not fit the GPU
(shared memory, registers, memory) is left out and named. `--smoke` runs every candidate once at a tiny size on a CPU,
and writes no table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from common import Device, Failure, Timing, attempt, copy_of, prepare, random_packed, say
from provenance import provenance
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, check_group_size, get_format
from amq.kernels import launch_table as tuning
from amq.kernels import triton
from amq.packing import PreparedWeight

OUT_FEATURES, SMOKE_OUT_FEATURES = 4096, 16
LAUNCHES = 20
"""Of one graph."""
DENSE_ROWS = (32, 64, 128, 256, 512)

Product = Callable[[Tensor, PreparedWeight], Tensor]


class Tuner:
    """Tries candidates on linears [out_features, in_features] of random weights."""

    def __init__(self, device: Device, out_features: int, group_size: int) -> None:
        self.device, self.out_features, self.group_size = device, out_features, group_size

    def weights(self, fmt: BitFormat, in_features: int) -> list[PreparedWeight]:
        """Copies to rotate through, larger together than the cache."""
        packed = random_packed(fmt, self.out_features, in_features, self.group_size, self.device.torch)
        first = prepare(packed, "cuda")
        return [first, *(copy_of(first) for _ in range(self.device.cold_bytes // first.data.nbytes))]

    def x(self, rows: int, in_features: int) -> Tensor:
        return torch.randn(rows, in_features, dtype=torch.float16, device=self.device.torch)

    def time(self, product: Product, x: Tensor, weights: Sequence[PreparedWeight]) -> Timing:
        launches = 1 if self.device.smoke else LAUNCHES
        return self.device.time([partial(product, x, weight) for weight in weights], launches)

    def best(
        self, key: str, candidates: dict[str, tuple[object, Product]], x: Tensor, weights: Sequence[PreparedWeight]
    ) -> dict[str, Any] | None:
        """The entry of the fastest candidate, {label: (parameters, product)}; None where none of them was timed."""
        tried = {}
        for label, (_, product) in candidates.items():
            found = attempt(self.device, self.time, product, x, weights)
            if not isinstance(found, Failure):
                tried[label] = found.us
                continue
            say(f"{key}: {label} is left out: {found.reason}")
            if found.broken:
                raise SystemExit(f"{label} took the GPU context along")
        timed = {label: us for label, us in tried.items() if us is not None}
        if not timed:
            return None
        fastest = min(timed, key=timed.__getitem__)
        say(f"{key}: {fastest} {timed[fastest]:.1f} µs of {len(timed)} tried")
        return {"parameters": candidates[fastest][0], "microseconds": timed[fastest], "tried": timed}

    def triton_candidates(self, rows: int, in_features: int, bits: int) -> dict[str, tuple[object, Product]]:
        """Variations of the launch that was reasoned out on paper, which is the first; all sum in its order."""
        paper = triton.choose(rows, in_features, bits)
        launches = [paper, replace(paper, block_n=2 * paper.block_n)]
        if paper.block_m == 0:
            launches += [replace(paper, block_n=paper.block_n // 2), replace(paper, block_n=4 * paper.block_n)]
        else:
            launches += [replace(paper, num_stages=stages) for stages in (2, 3)]

        def product(launch: triton.Launch) -> Product:
            return lambda x, weight: triton.linear(x, [weight], choose=lambda *_: launch)

        return {str(launch): (list(astuple(launch)), product(launch)) for launch in launches if launch.block_n}

    def dense_rows(self, weights: Sequence[PreparedWeight]) -> dict[str, Any] | None:
        """The entry of tuning.DENSE_KEY: the fewest rows of DENSE_ROWS from which the dense product wins for good."""
        tried, fewest = {}, 2 * DENSE_ROWS[-1]
        for rows in reversed(DENSE_ROWS):
            x = self.x(rows, weights[0].in_features)
            gemm = self.time(lambda x, weight: triton.linear(x, [weight], choose=triton.measured), x, weights).us
            dense = self.time(lambda x, weight: x @ triton.dequantize(weight, x.dtype).T, x, weights).us
            if gemm is None or dense is None:
                return None
            tried[str(rows)] = [gemm, dense]
            if dense >= gemm:
                break
            fewest = rows
        say(f"{tuning.DENSE_KEY}: {fewest}; rows: [gemm µs, dense µs] {tried}")
        return {"parameters": fewest, "tried": tried}


def tune(
    tuner: Tuner, in_features: Sequence[int], rows: Sequence[int], formats: Sequence[BitFormat]
) -> dict[str, dict[str, Any]]:
    """{key: entry} for `tuning.save`."""
    entries = {}
    for features in in_features:
        for fmt in formats:
            weights = tuner.weights(fmt, features)
            for count in rows:
                case = count, features, fmt.bits
                key = tuning.triton_key(*case)
                entries[key] = tuner.best(key, tuner.triton_candidates(*case), tuner.x(count, features), weights)
    entries[tuning.DENSE_KEY] = tuner.dense_rows(weights)
    return {key: entry for key, entry in entries.items() if entry is not None}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--in-features", default="4096,11008,14336", help="of the linears to tune for")
    parser.add_argument("--rows", default="1,16,32,128", help="of x: one of each class that has a launch of its own")
    parser.add_argument("--formats", default="int2,int3,int4")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: checks the code, writes nothing")
    arguments = parser.parse_args(argv)
    device = Device(arguments.smoke)
    formats = [get_format(name) for name in arguments.formats.split(",")]
    for fmt in formats:
        if reason := device.unsupported_reason("triton", fmt):
            raise AmqError(f"nothing to tune: Triton cannot run {fmt.name}: {reason}")
    out_features = SMOKE_OUT_FEATURES if arguments.smoke else OUT_FEATURES
    tuner = Tuner(device, out_features, check_group_size(arguments.group_size))
    in_features, rows = ([int(n) for n in text.split(",")] for text in (arguments.in_features, arguments.rows))
    entries = tune(tuner, in_features, rows, formats)
    if device.properties is None:
        say("a smoke run on a CPU: nothing was measured, no table is written")
        return 0
    made = provenance()
    about = {**{name: made["versions"][name] for name in ("torch", "triton")}, "date": made["date"][:10]}
    say(f"{len(entries)} entries in {tuning.save(device.properties.name, entries, about)}")
    return 0


if __name__ == "__main__":
    from amq.util.settings import run_command

    sys.exit(run_command(main, sys.argv[1:]))
