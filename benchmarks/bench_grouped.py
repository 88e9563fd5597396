"""Experts of a mixture on the CPU: a role's product in one grouped call against one call for each expert.

    python -m pytest benchmarks/bench_grouped.py --benchmark-json=FILE

An id reads format, experts that are hit of experts that there are, shape N×K, tokens, and threads. One round is a layer
step: the rows of every hit expert, through `amq.kernels.ops.grouped_linear`; which experts are hit changes from round
to round, over so many experts that their weights are cold. `loop` is the same through `amq.kernels.ops.linear`, one
call for each expert. `bandwidth_share` is GB/s over a plain read of memory that is measured right before and after, in
medians; `us_fastest` and `bandwidth_best_gbps` are what a busy machine still shows. `others` is the share of the cores'
time that other processes had meanwhile.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from bench_gemv import BUSY, Shape, Stage, build_weights, cache_bytes, significant

from amq.bench.machine import OtherWork
from amq.formats import FORMATS, BitFormat
from amq.kernels.ops import grouped_linear, linear
from amq.packing import PreparedWeight

pytestmark = pytest.mark.usefixtures("threads")
ROUNDS = 30


@dataclass(frozen=True)
class Case:
    """tokens are routed to `hit` of `experts` experts each; many of them share out over all experts evenly."""

    format: BitFormat
    shape: Shape
    threads: int
    tokens: int = 1
    hit: int = 8
    experts: int = 128

    def __str__(self) -> str:
        return f"{self.format.name}-{self.hit}of{self.experts}-{self.shape}-M{self.tokens}-threads{self.threads}"

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert that is hit."""
        rows = self.tokens * self.hit
        experts = min(rows, self.experts)
        return [rows // experts + (i < rows % experts) for i in range(experts)]


UP = Shape(768, 2048, "Qwen3-30B-A3B gate_proj, up_proj")
DOWN = Shape(2048, 768, "Qwen3-30B-A3B down_proj")


def grid(smoke: bool) -> list[Case]:
    if smoke:
        return [Case(FORMATS["int4"], Shape(40, 192, "smoke"), 2, tokens, 2, 8) for tokens in (1, 9)]
    one = [Case(FORMATS[name], shape, t) for name in ("int4", "int2") for shape in (UP, DOWN) for t in (1, 2)]
    return [*one, Case(FORMATS["int4"], UP, 2, 4), Case(FORMATS["int4"], UP, 2, 512)]


@pytest.fixture(scope="module")
def stage(smoke: bool) -> Stage:
    return Stage(smoke)


def hits(case: Case, weights: list[PreparedWeight]) -> Iterator[list[PreparedWeight]]:
    """Experts that are hit, round after round: through all of `weights` before one comes again."""
    count = len(case.sizes)
    start = 0
    while True:
        yield [weights[(start + i) % len(weights)] for i in range(count)]
        start = (start + count) % len(weights)


def loop(x: torch.Tensor, weights: list[PreparedWeight], sizes: list[int]) -> torch.Tensor:
    return torch.cat([linear(rows, [weight]) for rows, weight in zip(x.split(sizes), weights, strict=True)])


@torch.inference_mode()
def test_grouped(case: Case, stage: Stage, smoke: bool, benchmark) -> None:
    _, weights = build_weights(case.format, case.shape, 2**16 if smoke else 2 * cache_bytes())
    weights = (weights * math.ceil(len(case.sizes) / len(weights))) if len(weights) < len(case.sizes) else weights
    x = torch.randn(sum(case.sizes), case.shape.in_features, generator=torch.Generator().manual_seed(0))
    chosen = hits(case, weights)
    assert torch.equal(grouped_linear(x, first := next(chosen), case.sizes), loop(x, first, case.sizes))
    seconds: dict[str, list[float]] = {"grouped": [], "loop": []}

    def run() -> None:
        for name, multiply in (("grouped", grouped_linear), ("loop", loop)):  # by turns: the machine may be shared
            some = next(chosen)
            start = time.perf_counter()
            multiply(x, some, case.sizes)
            seconds[name].append(time.perf_counter() - start)

    readings, others = stage.bandwidth(), OtherWork()
    benchmark.pedantic(run, rounds=2 if smoke else ROUNDS, warmup_rounds=1)
    busy = others.share()
    readings += stage.bandwidth()
    bandwidth = statistics.median(readings)
    moved = sum(w.nbytes for w in weights[: len(case.sizes)])
    moved += 4 * sum(case.sizes) * (case.shape.out_features + case.shape.in_features)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info.update(
        format=case.format.name, shape=str(case.shape), source=case.shape.source, tokens=case.tokens, hit=case.hit,
        experts=case.experts, threads=case.threads, bytes=moved,
        us={name: round(value * 1e6, 1) for name, value in medians.items()},
        us_fastest={name: round(min(times) * 1e6, 1) for name, times in seconds.items()},
        gbps={name: significant(moved / value / 1e9) for name, value in medians.items()},
        bandwidth_gbps=significant(bandwidth / 1e9), bandwidth_best_gbps=significant(max(readings) / 1e9),
        bandwidth_share={name: significant(moved / value / bandwidth) for name, value in medians.items()},
        loop_over_grouped=significant(medians["loop"] / medians["grouped"]),
        others=None if busy is None else round(busy, 3), quotable=busy is not None and busy <= BUSY,
    )  # fmt: skip
